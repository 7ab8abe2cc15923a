"""What an adapter of any kind does to one layer: a change of its weight, or of its bias, or of both.

A kind reads its own tensors and answers two questions, as functions of the layer's weight and bias: what is added to
them at some strength? The layer itself is never written to. Where the sum of two products is as good as the product of
the sum, which holds for linear layers, convolutions and norms, the change acts beside the layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Shape = tuple[int, ...]


class Misfit(ValueError):
    """Tensors of a file that cannot change the layer that they name; says why."""


@dataclass(frozen=True)
class Facts:
    """What a file says of one layer besides its matrices.

    Attributes:
        alpha: see `factor`; None where nothing is said.
        rank: that PEFT's configuration states; None elsewhere, where the matrices tell it.
        options: PEFT's configuration, where there is one.
    """

    alpha: float | None = None
    rank: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def factor(self, rank: int) -> float:
        """alpha / rank, by which products of two matrices are multiplied; 1 where no alpha is given."""
        return 1.0 if self.alpha is None else self.alpha / rank


class LayerChange(nn.Module):
    """Base of all kinds but LoRA; they keep a file's tensors as they are. `kinds.new` makes those that are trained here.

    Class attributes:
        kind: what people call it.
        needs, takes: the tensors that it is made of, and those that may come with them, by role.
    """

    kind: ClassVar[str] = ""
    needs: ClassVar[frozenset[str]] = frozenset()
    takes: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, tensors: Mapping[str, Tensor], facts: Facts) -> None:
        super().__init__()
        self.facts = facts
        self.roles = tuple(tensors)
        for role, tensor in tensors.items():
            self.register_buffer(role, tensor)

    @classmethod
    def reads(cls, roles: Set[str]) -> bool:
        """Whether tensors of these roles make one."""
        return cls.needs <= roles

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], target: nn.Module, facts: Facts) -> Self:
        """The change of `target` that these tensors, by role, describe.

        Raises:
            Misfit: they are for a layer of another shape.
        """
        change = cls(tensors, facts)
        change.check(target)
        return change

    def check(self, target: nn.Module) -> None:
        """Raise a Misfit unless the change has the shape of what it changes, found without computing it."""
        meta = self.to_empty_copy()
        shapes = {"weight": tuple(target.weight.shape), "bias": tuple(target.weight.shape[:1])}
        for (name, shape), ask in zip(shapes.items(), (meta.weight_change, meta.bias_change), strict=True):
            try:
                found = ask(None if getattr(target, name) is None else torch.empty(shape, device="meta"))
            except Misfit:
                raise
            except (RuntimeError, IndexError, ValueError) as error:
                raise Misfit(f"{self.kind}: its tensors do not fit a {name} of {show(shape)}") from error
            if found is not None and not same_matrix(tuple(found.shape), shape):
                raise Misfit(f"{self.kind}: expected a change of {show(shape)}, found {show(tuple(found.shape))}")

    def to_empty_copy(self) -> Self:
        """The same on the meta device."""
        return type(self)({role: tensor.to("meta") for role, tensor in self.tensors().items()}, self.facts)

    def tensors(self) -> dict[str, Tensor]:
        """The file's tensors by role."""
        return {role: getattr(self, role) for role in self.roles}

    def role(self, name: str) -> Tensor | None:
        """One of the file's tensors in float32; None where it has none of that role."""
        return getattr(self, name).float() if name in self.roles else None

    def weight_change(self, weight: Tensor | None, strength: float = 1.0) -> Tensor | None:
        """What is added to the weight (out, in, ...), float32, in its shape or with the last sizes flattened."""
        return None

    def bias_change(self, bias: Tensor | None, strength: float = 1.0) -> Tensor | None:
        """What is added to the bias (out,), float32; the layer may have had none."""
        return None

    def added(self, target: nn.Module, x: Tensor, strength: float = 1.0) -> Tensor:
        """What is added to the output of `target` for the input `x`."""
        with torch.autocast(x.device.type, enabled=False):  # small differences of weights need all bits
            weight = self.weight_change(target.weight.detach().float(), strength)
            bias = self.bias_change(None if target.bias is None else target.bias.detach().float(), strength)
        weight = None if weight is None else weight.reshape(target.weight.shape).to(x.dtype)
        return apply_layer(target, x, weight, None if bias is None else bias.to(x.dtype))

    def follow(self, device: torch.device | str, dtype: torch.dtype) -> None:
        """Go where the layer is. The change is computed in float32 wherever that is."""
        self.to(device)


class Several(nn.ModuleList):
    """Changes of one layer that act together."""

    @property
    def kind(self) -> str:
        """All their names."""
        return " + ".join(dict.fromkeys(change.kind for change in self))

    def weight_change(self, weight: Tensor | None, strength: float = 1.0) -> Tensor | None:
        """See `LayerChange`."""
        return _sum(change.weight_change(weight, strength) for change in self)

    def bias_change(self, bias: Tensor | None, strength: float = 1.0) -> Tensor | None:
        """See `LayerChange`."""
        return _sum(change.bias_change(bias, strength) for change in self)

    def added(self, target: nn.Module, x: Tensor, strength: float = 1.0) -> Tensor:
        """See `LayerChange`."""
        return _sum(change.added(target, x, strength) for change in self)

    def follow(self, device: torch.device | str, dtype: torch.dtype) -> None:
        """See `LayerChange`."""
        for change in self:
            change.follow(device, dtype)

    def tensors(self) -> dict[str, Tensor]:
        """See `LayerChange`."""
        return {role: tensor for change in self for role, tensor in change.tensors().items()}


def apply_layer(target: nn.Module, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """The output for `x` of a layer like `target` with this weight and bias; no weight is one of zeros."""
    if weight is None:
        assert bias is not None
        return bias if isinstance(target, nn.Linear | nn.LayerNorm) else bias[:, None, None]
    if isinstance(target, nn.Linear):
        return F.linear(x, weight, bias)
    if isinstance(target, nn.Conv2d):
        return F.conv2d(x, weight, bias, target.stride, target.padding, target.dilation, target.groups)
    if isinstance(target, nn.LayerNorm):
        return F.layer_norm(x, target.normalized_shape, weight, bias, target.eps)
    return F.group_norm(x, target.num_groups, weight, bias, target.eps)


def same_matrix(found: Shape, expected: Shape) -> bool:
    """Whether both are the same rows and columns, windows of convolutions flattened or not."""
    return found[:1] == expected[:1] and torch.Size(found).numel() == torch.Size(expected).numel()


def show(shape: Shape) -> str:
    """A shape for people."""
    return "x".join(map(str, shape)) or "one number"


def _sum(changes: Any) -> Tensor | None:
    total = None
    for change in changes:
        if change is not None:
            total = change if total is None else total + change
    return total
