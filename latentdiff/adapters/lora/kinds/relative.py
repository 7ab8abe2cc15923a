"""Changes that are made from the weight itself: scaled channels (IA3), mixed inputs (GLoRA), new lengths (DoRA)."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor, nn

from latentdiff.adapters.lora.kinds.change import LayerChange
from latentdiff.adapters.lora.kinds.low_rank import LoRALayer
from latentdiff.adapters.lora.kinds.products import rebuilt


class IA3(LayerChange):
    """Output or input channels times a learned vector plus 1 (Liu et al. 2022); LyCORIS' form."""

    kind = "IA3"
    needs = frozenset({"weight", "on_input"})

    def weight_change(self, weight: Tensor, strength: float = 1.0) -> Tensor:
        """See `LayerChange`."""
        return strength * weight * along(self.role("weight"), weight.ndim, int(self.on_input.item() != 0))

    def to_empty_copy(self) -> Self:
        """The flag keeps its value."""
        empty = {role: tensor if role == "on_input" else tensor.to("meta") for role, tensor in self.tensors().items()}
        return type(self)(empty, self.facts)


class PEFTIA3(LayerChange):
    """Output channels, the bias too, times a learned vector (out, 1); or input channels, (1, in).

    For convolutions PEFT shapes both (1, channels, 1, 1); where they are as many, they are taken for output channels.
    """

    kind = "IA3 (PEFT)"
    needs = frozenset({"ia3_l"})

    def weight_change(self, weight: Tensor, strength: float = 1.0) -> Tensor:
        """See `LayerChange`."""
        axis = 0 if self._is_of_outputs(weight.shape[0]) else 1
        return strength * weight * (along(self.role("ia3_l"), weight.ndim, axis) - 1)

    def bias_change(self, bias: Tensor | None, strength: float = 1.0) -> Tensor | None:
        """See `LayerChange`."""
        if bias is None or not self._is_of_outputs(len(bias)):
            return None
        return strength * bias * (self.role("ia3_l").flatten() - 1)

    def _is_of_outputs(self, channels: int) -> bool:
        shape = self.ia3_l.shape
        return shape[-1] == 1 and shape[0] != 1 if len(shape) == 2 else self.ia3_l.numel() == channels


class GLoRA(LayerChange):
    """W a1 a2 + b1 b2 (Chavan et al. 2023), the second perhaps with a Tucker core."""

    kind = "GLoRA"
    needs = frozenset({"a1", "a2", "b1", "b2"})
    takes = frozenset({"bm"})

    def weight_change(self, weight: Tensor, strength: float = 1.0) -> Tensor:
        """See `LayerChange`."""
        a1, a2, b1, b2, core = (self.role(name) for name in ("a1", "a2", "b1", "b2", "bm"))
        mixed = torch.einsum("oi..., ij -> oj...", weight, a1.flatten(1) @ a2.flatten(1))
        own = rebuilt(b1, b2) if core is None else rebuilt(b1.flatten(1).mT, b2, core)
        return strength * self.facts.factor(a2.shape[0]) * (mixed + own.reshape(weight.shape))


class DoRA(nn.Module):
    """W' = m (W + dW) / ||W + dW|| (Liu et al. 2024), dW a change of another kind.

    Files store m as (out, 1, ...), a length for each output channel, or as (1, in, ...), one for each input channel;
    PEFT's `lora_magnitude_vector` is of output channels in any shape. A strength other than 1 goes part of the way
    from W to W', as A1111, ComfyUI and LyCORIS' functions have it; LyCORIS' modules scale the new lengths alone, and
    leave W + dW at 0.

    Args:
        inner: dW.
        lengths: m.
        axis: 0 for output channels, 1 for input channels.
        role: what the file calls m.
        ndim: how many sizes W has.
    """

    def __init__(self, inner: LayerChange | LoRALayer, lengths: Tensor, axis: int, role: str, ndim: int) -> None:
        super().__init__()
        self.inner, self.axis, self._role, self._ndim = inner, axis, role, ndim
        self.register_buffer("lengths", lengths.flatten())

    @property
    def kind(self) -> str:
        """With that of dW."""
        return "DoRA" if self.inner.kind == "LoRA" else f"{self.inner.kind} with DoRA"

    def weight_change(self, weight: Tensor, strength: float = 1.0) -> Tensor:
        """See `LayerChange`."""
        new = weight + self.inner.weight_change(weight).reshape(weight.shape)
        others = [axis for axis in range(weight.ndim) if axis != self.axis]
        length = torch.linalg.vector_norm(new, dim=others, keepdim=True) + torch.finfo(new.dtype).eps
        return strength * (new * along(self.lengths.float(), self._ndim, self.axis) / length - weight)

    def bias_change(self, bias: Tensor | None, strength: float = 1.0) -> None:
        """The bias stays."""

    added = LayerChange.added

    def follow(self, device: torch.device | str, dtype: torch.dtype) -> None:
        """Go where the layer is; lengths of 16 bits would be too coarse."""
        self.to(device)

    def tensors(self) -> dict[str, Tensor]:
        """See `LayerChange`."""
        return {**self.inner.tensors(), self._role: along(self.lengths, self._ndim, self.axis)}


def along(vector: Tensor, ndim: int, axis: int) -> Tensor:
    """A vector as a tensor that multiplies one of `ndim` sizes along one axis."""
    shape = [1] * ndim
    shape[axis] = -1
    return vector.reshape(shape)
