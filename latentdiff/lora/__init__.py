"""LoRA: small files of low-rank changes to a model. Making, attaching, merging, reading and writing them."""

from __future__ import annotations

from latentdiff.lora.adapter import LoRA, merge
from latentdiff.lora.metadata import lora_metadata
from latentdiff.lora.saving import DIALECTS, save_lora
from latentdiff.lora.spec import TARGET_GROUPS, LoRASpec

__all__ = ["DIALECTS", "TARGET_GROUPS", "LoRA", "LoRASpec", "lora_metadata", "merge", "save_lora"]
