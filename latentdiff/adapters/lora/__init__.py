"""LoRA and its relatives: small files of changes to a model. Making, attaching, merging, reading and writing them."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from latentdiff.adapters.lora.adapter import LoRA, merge
    from latentdiff.adapters.lora.kinds import LoRALayer
    from latentdiff.adapters.lora.loading import LoadReport, load_lora
    from latentdiff.adapters.lora.metadata import learned_words, lora_metadata, network_metadata
    from latentdiff.adapters.lora.reading import LoRAFile, made_for, read_lora
    from latentdiff.adapters.lora.saving import save_lora
    from latentdiff.adapters.lora.spec import TARGET_GROUPS, LoRASpec
    from latentdiff.adapters.lora.strength import Strength

# Where the names live, which is looked up when one is first used: most images are made without a LoRA.
_HOMES = {
    "TARGET_GROUPS": "spec",
    "LoRA": "adapter",
    "LoRAFile": "reading",
    "LoRALayer": "kinds",
    "LoRASpec": "spec",
    "LoadReport": "loading",
    "Strength": "strength",
    "learned_words": "metadata",
    "load_lora": "loading",
    "lora_metadata": "metadata",
    "made_for": "reading",
    "merge": "adapter",
    "network_metadata": "metadata",
    "read_lora": "reading",
    "save_lora": "saving",
}
__all__ = [
    "TARGET_GROUPS",
    "LoRA",
    "LoRAFile",
    "LoRALayer",
    "LoRASpec",
    "LoadReport",
    "Strength",
    "learned_words",
    "load_lora",
    "lora_metadata",
    "made_for",
    "merge",
    "network_metadata",
    "read_lora",
    "save_lora",
]


def __getattr__(name: str) -> object:
    from importlib import import_module

    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
