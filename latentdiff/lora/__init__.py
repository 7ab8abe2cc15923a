"""LoRA: small files of low-rank changes to a model. Making, attaching, merging, reading and writing them."""

from __future__ import annotations

from latentdiff.lora.adapter import LoRA, merge
from latentdiff.lora.spec import TARGET_GROUPS, LoRASpec

__all__ = ["TARGET_GROUPS", "LoRA", "LoRASpec", "merge"]
