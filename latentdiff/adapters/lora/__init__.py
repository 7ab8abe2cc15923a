"""LoRA: small files of low-rank changes to a model. Making, attaching, merging, reading and writing them."""

from __future__ import annotations

from latentdiff.adapters.lora.adapter import LoRA, LoRALayer, merge
from latentdiff.adapters.lora.loading import LoadReport, LoRAFile, load_lora, made_for, read_lora
from latentdiff.adapters.lora.metadata import lora_metadata
from latentdiff.adapters.lora.saving import save_lora
from latentdiff.adapters.lora.spec import TARGET_GROUPS, LoRASpec

__all__ = [
    "TARGET_GROUPS",
    "LoRA",
    "LoRAFile",
    "LoRALayer",
    "LoRASpec",
    "LoadReport",
    "load_lora",
    "lora_metadata",
    "made_for",
    "merge",
    "read_lora",
    "save_lora",
]
