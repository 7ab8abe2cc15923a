"""LoRA and its relatives: small files of changes to a model. Making, attaching, merging, reading and writing them."""

from __future__ import annotations

from latentdiff.adapters.lora.adapter import LoRA, merge
from latentdiff.adapters.lora.kinds import LoRALayer
from latentdiff.adapters.lora.loading import LoadReport, load_lora
from latentdiff.adapters.lora.metadata import learned_words, lora_metadata, network_metadata
from latentdiff.adapters.lora.reading import LoRAFile, made_for, read_lora
from latentdiff.adapters.lora.saving import save_lora
from latentdiff.adapters.lora.spec import TARGET_GROUPS, LoRASpec
from latentdiff.adapters.lora.strength import Strength

__all__ = [
    "TARGET_GROUPS",
    "LoRA",
    "LoRAFile",
    "LoRALayer",
    "LoRASpec",
    "LoadReport",
    "Strength",
    "load_lora",
    "learned_words",
    "lora_metadata",
    "made_for",
    "merge",
    "network_metadata",
    "read_lora",
    "save_lora",
]
