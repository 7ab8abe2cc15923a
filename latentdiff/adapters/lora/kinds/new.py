"""New changes of a layer, to be trained: float32 parameters that change nothing yet, drawn as their authors draw them.

What is trained is of the same classes as what is read from files, so a file gives the same to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import isqrt

import torch
from torch import Tensor, nn

from latentdiff.adapters.lora.kinds.change import Facts, LayerChange
from latentdiff.adapters.lora.kinds.low_rank import LoRALayer
from latentdiff.adapters.lora.kinds.products import LoHa, LoKr
from latentdiff.adapters.lora.kinds.relative import DoRA
from latentdiff.adapters.lora.kinds.rotations import OFT
from latentdiff.errors import UsageError


@dataclass(frozen=True)
class Shape:
    """What a new change of one layer is made by.

    Attributes:
        rank: inner width; of OFT, the largest size of a block.
        alpha: products are multiplied by alpha / rank.
        axis: of DoRA, 0 for a length of each output, 1 for one of each input.
        factor: of LoKr, the largest size of the first factor; None is the square root of the layer's.
    """

    rank: int
    alpha: float
    axis: int = 1
    factor: int | None = None


def new_lora(target: nn.Module, shape: Shape, generator: torch.Generator) -> LoRALayer:
    """A product of two matrices (Hu et al. 2021)."""
    layer = LoRALayer(target, shape.rank, shape.alpha)
    layer.reset(generator)
    return layer


def new_dora(target: nn.Module, shape: Shape, generator: torch.Generator) -> DoRA:
    """A LoRA whose sum with the weight gets lengths of its own, at first those of the weight (Liu et al. 2024)."""
    weight = target.weight.detach().float()
    others = [axis for axis in range(weight.ndim) if axis != shape.axis]
    lengths = torch.linalg.vector_norm(weight, dim=others)
    change = DoRA(new_lora(target, shape, generator), lengths, shape.axis, "dora_scale", weight.ndim)
    change.lengths = nn.Parameter(change.lengths)
    return change


def new_loha(target: nn.Module, shape: Shape, generator: torch.Generator) -> LayerChange:
    """Two products of matrices, of which one is zero, multiplied element by element (Yeh et al. 2023)."""
    out, inner = target.weight.flatten(1).shape
    tensors = {
        "hada_w1_a": nn.init.normal_(torch.empty(out, shape.rank), std=0.1, generator=generator),
        "hada_w1_b": nn.init.normal_(torch.empty(shape.rank, inner), std=1, generator=generator),
        "hada_w2_a": torch.zeros(out, shape.rank),
        "hada_w2_b": nn.init.normal_(torch.empty(shape.rank, inner), std=1, generator=generator),
    }
    return _learning(LoHa(tensors, Facts(shape.alpha)))


def new_lokr(target: nn.Module, shape: Shape, generator: torch.Generator) -> LayerChange:
    """kron(w1, w2) with w2 zero, and a product of two matrices where that is smaller (Yeh et al. 2023)."""
    out, inner, *window = target.weight.shape
    (out_1, out_2), (inner_1, inner_2) = (_factors(size, shape.factor) for size in (out, inner))
    tensors = {"lokr_w1": _uniform((out_1, inner_1), generator)}
    if 2 * shape.rank < max(out_2, inner_2):
        tensors["lokr_w2_a"] = _uniform((out_2, shape.rank), generator)
        tensors["lokr_w2_b"] = torch.zeros(shape.rank, inner_2 * torch.Size(window).numel())
    else:
        tensors["lokr_w2"] = torch.zeros(out_2, inner_2, *window)
    return _learning(LoKr(tensors, Facts(shape.alpha)))


def new_oft(target: nn.Module, shape: Shape, generator: torch.Generator) -> LayerChange:
    """Rotations of blocks of output channels, at first by nothing (Qiu et al. 2023), as LyCORIS writes them.

    Raises:
        UsageError: the output channels cannot be divided into blocks.
    """
    out = target.weight.shape[0]
    size = next(size for size in range(min(shape.rank, out), 0, -1) if out % size == 0)
    if size == 1:
        raise UsageError(
            f"expected an OFT rank up to which {out} output channels can be divided into blocks of 2 or more, found"
            f" {shape.rank}; take a larger one, or leave that layer out with block_rank"
        )
    return _learning(OFT({"oft_blocks": torch.zeros(out // size, size, size)}, Facts(0.0)))  # 0: no bound


NEW: dict[str, Callable[[nn.Module, Shape, torch.Generator], nn.Module]] = {
    "lora": new_lora, "dora": new_dora, "loha": new_loha, "lokr": new_lokr, "oft": new_oft,
}  # fmt: skip


def _learning(change: LayerChange) -> LayerChange:
    """The same with its tensors as parameters."""
    for role, tensor in change.tensors().items():
        delattr(change, role)
        change.register_parameter(role, nn.Parameter(tensor))
    return change


def _factors(size: int, largest: int | None) -> tuple[int, int]:
    """Two numbers whose product is `size`, the smaller first, which is as large as may be."""
    most = min(isqrt(size), largest or size)
    small = next(number for number in range(most, 0, -1) if size % number == 0)
    return small, size // small


def _uniform(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    return nn.init.kaiming_uniform_(torch.empty(shape), a=5**0.5, generator=generator)
