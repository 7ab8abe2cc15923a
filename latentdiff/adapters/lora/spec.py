"""Which layers of a model a LoRA adapts, and how strongly."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from torch import nn

from latentdiff.adapters.lora.kinds.new import NEW, Shape
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

T = TypeVar("T")

# Parts of a model that ranks and learning rates may be given for.
BLOCKS = {
    "down": r"unet\.(conv_in|down_blocks\.).*",
    "mid": r"unet\.mid_block\..*",
    "up": r"unet\.(up_blocks\.|conv_out).*",
    "text_encoder": r"text_encoder(_2)?\..*",
}


@dataclass(frozen=True)
class LoRASpec:
    """Shape of a new LoRA, or of an adapter of another kind.

    Attributes:
        rank: inner width, 1 or more; of OFT, the largest size of a block, 2 or more.
        alpha: the change of a weight is multiplied by alpha / rank; None is the rank.
        targets: names of groups (see `TARGET_GROUPS`), or patterns with * that are matched with full names such as
            `unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k`.
        kind: "lora", "dora", "loha", "lokr" or "oft"; see `kinds.new`.
        block_rank: other ranks for some layers, by a block (see `BLOCKS`), a group or a pattern; the last that fits
            decides, and 0 leaves the layers out.
        rank_stabilized: multiply by alpha / sqrt(rank) (rsLoRA, Kalajdzievski 2023).
        axis: of DoRA, 0 for a length of each output, 1 for one of each input.
        factor: of LoKr, the largest size of the first factor; None is the square root of the layer's.
    """

    rank: int = 8
    alpha: float | None = None
    targets: tuple[str, ...] = ("attention",)
    kind: str = "lora"
    block_rank: Mapping[str, int] = field(default_factory=dict)
    rank_stabilized: bool = False
    axis: int = 1
    factor: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in NEW:
            raise UsageError(f"expected a kind of adapter, one of {', '.join(NEW)}, found {self.kind!r}")
        if self.rank < 1:
            raise UsageError(f"expected a LoRA rank of 1 or more, found {self.rank}")
        if self.alpha is not None and not 0 < self.alpha < float("inf"):
            raise UsageError(f"expected a LoRA alpha above 0, found {self.alpha}")
        if not self.targets:
            raise UsageError(
                f"expected LoRA targets, found none; choose from {', '.join(TARGET_GROUPS)}, or give patterns"
            )

    def shape(self, rank: int) -> Shape:
        """That of a layer with this rank."""
        alpha = float(rank if self.alpha is None else self.alpha) * (rank**0.5 if self.rank_stabilized else 1.0)
        return Shape(rank, alpha, self.axis, self.factor)

    def select(self, unet: UNet, text_encoder: nn.Module | None) -> dict[str, tuple[nn.Module, Shape]]:
        """The layers that this spec names, by full name, in the order of the model, and the shape of each one's change.

        Raises:
            UsageError: a target or a block fits no layer, or all are left out.
        """
        unused = unused_by(text_encoder)
        layers = {name: layer for name, layer in adaptable(unet, text_encoder) if not name.startswith(unused)}
        chosen = {name for target in self.targets for name in _fitting(target, layers, "LoRA target", TARGET_GROUPS)}
        ranks = by_block(self.block_rank, [name for name in layers if name in chosen], self.rank, "block_rank")
        if not any(ranks.values()):
            raise UsageError("block_rank leaves out every layer; expected one with a rank of 1 or more")
        return {name: (layers[name], self.shape(rank)) for name, rank in ranks.items() if rank}


def by_block(given: Mapping[str, T], names: list[str], default: T, what: str) -> dict[str, T]:
    """What is given for each of these layers by a block (see `BLOCKS`), a group or a pattern; the last that fits decides.

    Raises:
        UsageError: one fits no layer.
    """
    found = dict.fromkeys(names, default)
    for pattern, value in given.items():
        found |= dict.fromkeys(_fitting(pattern, names, what, TARGET_GROUPS | BLOCKS), value)
    return found


def _fitting(pattern: str, names: Iterable[str], what: str, groups: Mapping[str, str]) -> list[str]:
    """Those of the names that a group or a pattern fits."""
    expression = groups.get(pattern) or fnmatch.translate(pattern)
    found = [name for name in names if re.fullmatch(expression, name)]
    if not found:
        raise UsageError(
            f"the {what} {pattern!r} fits no layer of this model; expected one of {', '.join(groups)}, or a pattern such"
            " as unet.*.attn2.to_k"
        )
    return found


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
