"""Which layers of a model a LoRA adapts, and how strongly."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from latentdiff.errors import UsageError
from latentdiff.networks.text_encoders import encoders_of, unused_by
from latentdiff.networks.unet import UNet

# Groups of layers by what their full names look like: the part's name, then the module's path in it.
TARGET_GROUPS = {
    "attention": r"unet\..*\.attn[12]\.(to_q|to_k|to_v|to_out\.0)",
    "feed_forward": r"unet\..*\.ff\.net\.(0\.proj|2)",
    "projections": r"unet\..*\.attentions\.\d+\.(proj_in|proj_out)",
    "convolutions": r"unet\..*\.(conv1|conv2|conv_shortcut|(down|up)samplers\.0\.conv)",
    "text_encoder": r"text_encoder(_2)?\..*\.self_attn\.(q_proj|k_proj|v_proj|out_proj)",
    "text_encoder_mlp": r"text_encoder(_2)?\..*\.mlp\.(fc1|fc2)",
}


@dataclass(frozen=True)
class LoRASpec:
    """Shape of a new LoRA.

    Attributes:
        rank: inner width, 1 or more.
        alpha: the change of a weight is multiplied by alpha / rank; None is the rank.
        targets: names of groups (see `TARGET_GROUPS`), or patterns with * that are matched with full names such as
            `unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k`.
    """

    rank: int = 8
    alpha: float | None = None
    targets: tuple[str, ...] = ("attention",)

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise UsageError(f"expected a LoRA rank of 1 or more, found {self.rank}")
        if self.alpha is not None and not 0 < self.alpha < float("inf"):
            raise UsageError(f"expected a LoRA alpha above 0, found {self.alpha}")
        if not self.targets:
            raise UsageError(
                f"expected LoRA targets, found none; choose from {', '.join(TARGET_GROUPS)}, or give patterns"
            )

    @property
    def strength(self) -> float:
        """alpha, or what stands for it."""
        return float(self.rank if self.alpha is None else self.alpha)

    def select(self, unet: UNet, text_encoder: nn.Module | None) -> dict[str, nn.Module]:
        """The layers that this spec names, by full name, in the order of the model.

        Raises:
            UsageError: a target fits no layer.
        """
        unused = unused_by(text_encoder)
        layers = {name: layer for name, layer in adaptable(unet, text_encoder) if not name.startswith(unused)}
        chosen: set[str] = set()
        for target in self.targets:
            found = {name for name in layers if _fits(name, target)}
            if not found:
                groups = ", ".join(TARGET_GROUPS)
                raise UsageError(
                    f"the LoRA target {target!r} fits no layer of this model; expected one of {groups}, or a pattern such as "
                    "unet.*.attn2.to_k"
                )
            chosen |= found
        return {name: layer for name, layer in layers.items() if name in chosen}


def adaptable(unet: nn.Module, text_encoder: nn.Module | None) -> Iterator[tuple[str, nn.Module]]:
    """Every linear layer and convolution that a LoRA can adapt, by full name."""
    for name, layer in changeable(unet, text_encoder):
        if isinstance(layer, nn.Linear | nn.Conv2d):
            yield name, layer


def changeable(unet: nn.Module, text_encoder: nn.Module | None) -> Iterator[tuple[str, nn.Module]]:
    """Every layer that some kind of adapter can change: those of `adaptable`, and norms."""
    for part, module in {"unet": unet, **encoders_of(text_encoder)}.items():
        for name, layer in module.named_modules():
            # Not their subclasses: torch's fused attention holds one whose forward is never called.
            if type(layer) in (nn.Linear, nn.Conv2d, nn.LayerNorm, nn.GroupNorm):
                yield f"{part}.{name}", layer


def _fits(name: str, target: str) -> bool:
    if target in TARGET_GROUPS:
        return re.fullmatch(TARGET_GROUPS[target], name) is not None
    return fnmatchcase(name, target)
