"""A model as named tensors and configuration files, before any module is built: what all layouts have in common."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from latentdiff.checkpoints.distilled import Distilled
from latentdiff.checkpoints.families import is_text
from latentdiff.networks.text_encoder import PREFIX, PROJECTION
from latentdiff.prompts.words import Words

PART_LABELS = {
    "unet": "U-Net", "vae": "VAE", "text_encoder": "text encoder", "text_encoder_2": "second text encoder",
    "image_encoder": "image encoder", "image_normalizer": "statistics of embeddings",
}  # fmt: skip


@dataclass
class RawModel:
    """What a folder or a single file holds.

    The readers of both layouts make one, the writers of both take one. `extras` and `names` hold what
    one layout can say and the other cannot, so that converting there and back loses nothing.
    """

    source: Path
    tensors: dict[str, dict[str, Tensor]]  # part -> name in the diffusers layout -> tensor
    configs: dict[str, dict[str, Any]]  # part or "scheduler" or "model_index" -> the folder's JSON file
    tokenizer: dict[str, str]  # file name -> text, of the first text encoder
    extras: dict[str, Tensor] = field(default_factory=dict)  # original name -> tensor without place in a folder
    names: dict[str, dict[str, str]] = field(default_factory=dict)  # part -> name -> other name on disk
    metadata: dict[str, str] = field(default_factory=dict)  # foreign text metadata of a single file
    warnings: list[str] = field(default_factory=list)  # guesses that may be wrong
    left_out: list[str] = field(default_factory=list)  # parts of the source that nothing here uses
    weight_files: tuple[Path, ...] = ()
    second_tokenizer: dict[str, str] = field(default_factory=dict)  # where there are two text encoders
    words: Words | None = None  # what a small model says that it knows
    distilled: Distilled | None = None  # what it draws with in few steps
    beside: dict[str, dict[str, Tensor]] = field(
        default_factory=dict
    )  # as `tensors`, of unCLIP: what it sees images with

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts that it has, in their order."""
        return tuple(part for part in PART_LABELS if part in self.tensors)


# Names that diffusers gave to the VAE's attention until 0.17, as published folders still have them.
_OLD_VAE_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def usual_name(part: str, name: str) -> str:
    """The name that today's diffusers layout gives to `name`, which an older or newer writer spelt otherwise."""
    if is_text(part) and not name.startswith((PREFIX, PROJECTION)):
        return f"text_model.{name}"
    if part == "vae" and ".mid_block.attentions." in name:
        module, _, leaf = name.rpartition(".")
        block, _, last = module.rpartition(".")
        return f"{block}.{_OLD_VAE_ATTENTION.get(last, last)}.{leaf}"
    return name


def with_usual_names(part: str, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Rename to the usual names; the second result says what differs, usual name -> name on disk."""
    usual = {usual_name(part, name): tensor for name, tensor in tensors.items()}
    others = {usual_name(part, name): name for name in tensors if usual_name(part, name) != name}
    return usual, others
