"""Products of two matrices (LoRA, Hu et al. 2021), and of three for convolutions."""

from __future__ import annotations

from collections.abc import Mapping, Set
from functools import partial
from typing import ClassVar, Self

import torch
from torch import Tensor, nn
from torch.func import functional_call

from latentdiff.adapters.lora.kinds.change import Facts, LayerChange, Misfit, show


class LoRALayer(nn.Module):
    """The change of one layer. For a convolution (Yeh et al. 2023, "LoCon"), `lora_down` has its kernel and stride.

    A new one changes nothing: `lora_up` is zero.

    Args:
        target: the layer that is adapted; only its sizes are read.
        rank: inner width.
        alpha: see `LoRASpec`.
    """

    kind: ClassVar[str] = "LoRA"
    needs: ClassVar[frozenset[str]] = frozenset({"down", "up"})
    takes: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, target: nn.Linear | nn.Conv2d, rank: int, alpha: float) -> None:
        super().__init__()
        self.rank, self.alpha = rank, alpha
        new = partial(nn.utils.skip_init, dtype=torch.float32)  # does not draw from the global random generator
        if isinstance(target, nn.Conv2d):
            window = {name: getattr(target, name) for name in ("stride", "padding", "dilation", "padding_mode")}
            self.lora_down = new(nn.Conv2d, target.in_channels, rank, target.kernel_size, bias=False, **window)
            self.lora_up = new(nn.Conv2d, rank, target.out_channels, 1, bias=False)
        else:
            self.lora_down = new(nn.Linear, target.in_features, rank, bias=False)
            self.lora_up = new(nn.Linear, rank, target.out_features, bias=False)
        self.reset(torch.Generator())

    @classmethod
    def reads(cls, roles: Set[str]) -> bool:
        """Whether tensors of these roles make one."""
        return cls.needs <= roles

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], target: nn.Module, facts: Facts) -> Self:
        """The change that a file's matrices describe, in float32, as if it had been trained here.

        Raises:
            Misfit: they are for a layer of another shape.
        """
        down, up = tensors["down"], tensors["up"]
        rank = down.shape[0] if down.ndim else 0
        weight = target.weight
        expected = {"down": (rank, *weight.shape[1:]), "up": (weight.shape[0], rank, *(1,) * (weight.ndim - 2))}
        for role, shape in expected.items():
            if rank == 0 or _without_window(tensors[role].shape) != _without_window(shape):
                raise Misfit(f"{role}: expected {show(shape)}, found {show(tuple(tensors[role].shape))}")
        layer = cls(target, rank, facts.factor(rank) * rank)
        for tensor, part in ((down, layer.lora_down), (up, layer.lora_up)):
            part.weight.data.copy_(tensor.reshape(part.weight.shape))
        return layer

    def reset(self, generator: torch.Generator) -> None:
        """Draw `lora_down` as linear layers are drawn (uniform, He et al. 2015, a = √5), and zero `lora_up`."""
        nn.init.kaiming_uniform_(self.lora_down.weight, a=5**0.5, generator=generator)
        nn.init.zeros_(self.lora_up.weight)

    @property
    def factor(self) -> float:
        """What the product of the two matrices is multiplied by."""
        return self.alpha / self.rank

    def forward(self, x: Tensor, scale: float = 1.0, inner: Tensor | None = None) -> Tensor:
        """Input of the layer -> what is added to its output, in the precision of the input or that of autocast.

        Args:
            inner: factors on the numbers between the two matrices, (n, rank) for n inputs.
        """
        h = _in_precision_of(x, self.lora_down, x)
        if inner is not None:
            between = h.ndim - 2
            ones = (*inner.shape, *[1] * between) if isinstance(self.lora_down, nn.Conv2d) else None
            h = h * inner.to(h.dtype).view(ones or (len(inner), *[1] * between, self.rank))
        return _in_precision_of(x, self.lora_up, h) * (self.factor * scale)

    def added(self, target: nn.Module, x: Tensor, strength: float = 1.0) -> Tensor:
        """See `LayerChange`; the large matrix is never made."""
        return self(x, strength)

    def weight_change(self, weight: Tensor | None = None, strength: float = 1.0) -> Tensor:
        """The change of the layer's weight, in its shape, in float32."""
        up, down = self.lora_up.weight.float(), self.lora_down.weight.float()
        product = up.flatten(1) @ down.flatten(1)  # (out, rank) (rank, in k k)
        return strength * self.factor * product.reshape(up.shape[0], *down.shape[1:])

    def bias_change(self, bias: Tensor | None, strength: float = 1.0) -> None:
        """A LoRA leaves the bias alone."""

    def tensors(self) -> dict[str, Tensor]:
        """The matrices by role."""
        return {"down": self.lora_down.weight, "up": self.lora_up.weight}

    def follow(self, device: torch.device | str, dtype: torch.dtype) -> None:
        """Go where the layer is, in its precision."""
        self.to(device, dtype)


class Tucker(LayerChange):
    """A convolution's LoRA with its window in a small matrix between the two (LyCORIS, `use_tucker`).

    The change is sum_mn mid[m, n, k, l] up[o, m] down[n, i].
    """

    kind = "LoRA with a middle matrix"
    needs = frozenset({"down", "mid", "up"})

    def weight_change(self, weight: Tensor | None, strength: float = 1.0) -> Tensor:
        """See `LayerChange`."""
        down, mid, up = self.role("down").flatten(1), self.role("mid"), self.role("up").flatten(1)
        factor = strength * self.facts.factor(down.shape[0])
        return factor * torch.einsum("mn..., om, ni -> oi...", mid, up, down)


def _without_window(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The same matrix as a linear layer and as a 1x1 convolution."""
    return tuple(shape[:2]) if tuple(shape[2:]) == (1, 1) else tuple(shape)


def _in_precision_of(x: Tensor, layer: nn.Module, argument: Tensor) -> Tensor:
    if layer.weight.dtype == x.dtype or torch.is_autocast_enabled(x.device.type):
        return layer(argument)
    return functional_call(layer, {"weight": layer.weight.to(x.dtype)}, (argument,))
