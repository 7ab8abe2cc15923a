"""The U-Net with weights and activations of 8 bits on an x86 CPU: an approximation, for speed.

Weights are rounded once, with one scale for each output channel; activations at every call, with one scale and zero
point for each tensor, from its least and its greatest value. Sums are exact in 32 bits. What is small or sensitive
keeps its precision: the first and the last convolution, the timestep, the norms and the products of attention; and so
do the first and the last steps. (Intel, who did the same on Stable Diffusion 1.5 in 2023, published an FID of 30.6 in
bf16, 31.1 like this, and 35.5 with all steps in 8 bits.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from latentdiff.engines.replacement import forms_in_force, refuse_gradients, state_of
from latentdiff.errors import UsageError
from latentdiff.networks.kernels import has_taps
from latentdiff.networks.layers import Context, FeedForward
from latentdiff.networks.unet import UNet

OUTER = 0.1  # share of the timesteps, at each end, that are computed in the U-Net's own precision
TIMESTEPS = 1000
MIN_CHANNELS = 64  # a product over fewer is bound by rounding its input
FF_ROWS = 1024  # tokens that go through a feed-forward at a time, per thread
PIECE = 2**16  # numbers that are rounded at a time: few enough to stay in a core's cache
_SENSITIVE = ("conv_in", "conv_out", "time_emb")  # parts of names

Forward = Callable[..., Tensor]


@cache
def int8_is_possible() -> bool:
    """Whether torch offers the 8-bit products of oneDNN here, and the instructions it takes for them sum exactly.

    What the processor has does not answer that: with ONEDNN_MAX_CPU_ISA=AVX2, oneDNN takes instructions whose sums of
    two products stop at 2^15 - 1, in silence.
    """
    return _torch_offers_it() and multiplies_in_8_bits() and _sums_exactly()


def _torch_offers_it() -> bool:
    """False with torch 2.6, where the convolution has another name."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.onednn, "qconv_pointwise")


@torch.no_grad()
def _sums_exactly() -> bool:
    """Whether the greatest products of 8 bits, added up, are their sum."""
    rows, columns = 16, 64
    product = _Product(torch.ones(rows, columns), None)
    sums = product(torch.full((1, columns), 255, dtype=torch.uint8), 1.0, 0)
    return torch.allclose(sums, torch.full_like(sums, 255.0 * columns), rtol=1e-3)


def multiplies_in_8_bits() -> bool:
    """Whether an x86 processor has instructions for sums of products of 8-bit numbers (VNNI or AMX)."""
    probes = ("_is_vnni_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, probe, lambda: False)() for probe in probes)


class Int8Network:
    """A U-Net in 8 bits, except for the first and last timesteps; called as the U-Net is.

    The U-Net's weights stay as they are, and LoRAs and other taps act on it as ever. Scales belong to a whole batch:
    its images are those made alone up to what rounding to 8 bits changes.

    Raises:
        UsageError: the U-Net is not on a CPU that multiplies 8-bit numbers faster, or torch does not offer it.
    """

    def __init__(self, unet: UNet) -> None:
        if not _torch_offers_it():
            raise UsageError(
                f"--precision int8 needs oneDNN's products of 8 bits, which torch {torch.__version__} does not offer here; "
                "install a newer torch for x86, or choose bf16 or fp32"
            )
        if not int8_is_possible():
            raise UsageError(
                "--precision int8 needs a CPU with VNNI instructions (AVX-512 or AMX), and oneDNN free to use them "
                "(ONEDNN_MAX_CPU_ISA not set lower); choose bf16 or fp32"
            )
        self._unet = unet
        self._rounding = _Rounding()
        self._forms: dict[nn.Module, Forward] = {}
        self._state: Hashable = None

    def __call__(self, x: Tensor, t: Tensor | float, context: Context) -> Tensor:
        """See `UNet.forward`."""
        refuse_gradients("--precision int8", x, *([context] if isinstance(context, Tensor) else []))
        if x.device.type != "cpu":
            raise UsageError(
                f"--precision int8 computes on the CPU, found the model on {x.device.type}; add --device cpu"
            )
        if is_outer(float(torch.as_tensor(t).flatten()[0])):
            return self._unet(x, t, context)
        if self._state != state_of(self._unet):
            self._forms, self._state = _forms(self._unet, self._rounding), state_of(self._unet)
        with torch.no_grad(), forms_in_force(self._forms):
            out = self._unet(x, t, context)
        self._rounding.forget()
        return out


def is_outer(t: float) -> bool:
    """Whether timestep `t` is one of the first or last, which are not rounded."""
    return not OUTER * TIMESTEPS <= t <= (1.0 - OUTER) * TIMESTEPS


def _forms(unet: UNet, rounding: _Rounding) -> dict[nn.Module, Forward]:
    forms: dict[nn.Module, Forward] = {}
    for name, module in unet.named_modules():
        if isinstance(module, FeedForward):
            forms[module] = _Int8FeedForward(module, rounding)
        elif isinstance(module, (nn.Linear, nn.Conv2d)) and not any(part in name for part in _SENSITIVE):
            if module.weight.shape[1] >= MIN_CHANNELS:
                forms[module] = _Int8Layer(module, rounding)
    return forms


class _Rounding:
    """Activations to unsigned 8 bits; keeps the last one, because queries, keys and values are made of the same."""

    def __init__(self) -> None:
        self._last: tuple[Tensor, int] | None = None
        self._result: tuple[Tensor, float, int] | None = None

    def __call__(self, x: Tensor) -> tuple[Tensor, float, int] | None:
        """x, dense -> (rounded, scale, zero point) with x = scale (rounded - zero point); None if x is not finite."""
        if x.is_inference():  # does not count its changes, so what was rounded before may be another one
            return _rounded(x)
        if self._last is None or self._last[0] is not x or self._last[1] != x._version:
            self._last, self._result = (x, x._version), _rounded(x)
        return self._result

    def forget(self) -> None:
        """Keep nothing beyond a step."""
        self._last = self._result = None


def _rounded(x: Tensor) -> tuple[Tensor, float, int] | None:
    low, high = float(x.amin()), float(x.amax())
    if not math.isfinite(high - low):
        return None
    low, high = min(0.0, low), max(0.0, high)
    scale = max(high - low, 1e-12) / 254  # one value is left free, so that rounding the zero point never overflows
    zero = round(-low / scale)
    rounded = torch.empty_like(x, dtype=torch.uint8)
    is_map = x.ndim == 4
    values, results = (each.permute(0, 2, 3, 1).flatten() if is_map else each.flatten() for each in (x, rounded))
    for piece, result in zip(values.split(PIECE), results.split(PIECE), strict=True):
        # The conversion cuts fractions off; what comes before it is positive, so a half makes that rounding.
        result.copy_(piece.to(torch.float32, copy=True).mul_(1.0 / scale).add_(zero + 0.5))
    return rounded, scale, zero


class _Weight:
    """A weight (O, I, ...) in signed 8 bits with one scale for each of its outputs."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        rows = weight.float().flatten(1)
        self.scales = (rows.abs().amax(dim=1) / 127).clamp_min(1e-12)  # (O,)
        self.values = (rows / self.scales[:, None]).round().to(torch.int8).reshape(weight.shape)
        self.zeros = torch.zeros(len(rows), dtype=torch.int64)
        self.bias = None if bias is None else bias.float()


class _Product:
    """x (..., I) in 8 bits -> x weightᵀ + bias in `dtype`, with GELU behind it if that is asked for."""

    def __init__(self, weight: Tensor, bias: Tensor | None, *, gelu: bool = False) -> None:
        self._weight, self._dtype = _Weight(weight, bias), weight.dtype
        self._packed = torch.ops.onednn.qlinear_prepack(self._weight.values, None)
        self._then = ("gelu", [], "none") if gelu else ("none", [], "")

    def __call__(self, x: Tensor, scale: float, zero: int) -> Tensor:
        w = self._weight
        return torch.ops.onednn.qlinear_pointwise(
            x, scale, zero, self._packed, w.scales, w.zeros, w.bias, 1.0, 0, self._dtype, *self._then
        )


class _Convolution:
    """x (N, I, h, w) in 8 bits, channels last -> (N, O, h', w') in the dtype of the layer."""

    def __init__(self, layer: nn.Conv2d) -> None:
        self._weight, self._dtype = _Weight(layer.weight, layer.bias), layer.weight.dtype
        self._geometry = [list(each) for each in (layer.stride, layer.padding, layer.dilation)]
        w = self._weight
        self._packed = torch.ops.onednn.qconv_prepack(w.values, w.scales, 1.0, 0, *self._geometry, 1, None)

    def __call__(self, x: Tensor, scale: float, zero: int) -> Tensor:
        w = self._weight
        return torch.ops.onednn.qconv_pointwise(
            x,
            scale,
            zero,
            self._packed,
            w.scales,
            w.zeros,
            w.bias,
            *self._geometry,
            1,
            1.0,
            0,
            self._dtype,
            "none",
            [],
            "",
        )


class _Int8Layer:
    """The forward of a linear layer or convolution in 8 bits."""

    def __init__(self, layer: nn.Linear | nn.Conv2d, rounding: _Rounding) -> None:
        self._layer, self._rounding = layer, rounding
        is_linear = isinstance(layer, nn.Linear)
        self._compute = _Product(layer.weight, layer.bias) if is_linear else _Convolution(layer)
        self._order = torch.contiguous_format if is_linear else torch.channels_last

    def __call__(self, x: Tensor) -> Tensor:
        if not x.is_contiguous(memory_format=self._order):
            x = x.contiguous(memory_format=self._order)
        rounded = self._rounding(x)
        return type(self._layer).forward(self._layer, x) if rounded is None else self._compute(*rounded)


class _Int8FeedForward:
    """The forward of a feed-forward in 8 bits, in pieces of as many tokens as the caches hold."""

    def __init__(self, block: FeedForward, rounding: _Rounding) -> None:
        self._block = block
        inner, outer = block.net[0].proj, block.net[2]
        (value, gate), (value_bias, gate_bias) = inner.weight.chunk(2), inner.bias.chunk(2)
        self._value, self._gate = _Product(value, value_bias), _Product(gate, gate_bias, gelu=True)
        self._outer = _Product(outer.weight, outer.bias)

    def __call__(self, x: Tensor) -> Tensor:
        if has_taps(self._block):
            return FeedForward.forward(self._block, x)
        rows = FF_ROWS * torch.get_num_threads()
        return torch.cat([self._piece(piece) for piece in x.flatten(0, 1).split(rows)]).unflatten(0, x.shape[:2])

    def _piece(self, x: Tensor) -> Tensor:
        rounded = _rounded(x)
        if rounded is None:
            return FeedForward.forward(self._block, x)
        hidden = self._value(*rounded).mul_(self._gate(*rounded))
        rounded = _rounded(hidden)
        return (
            F.linear(hidden, self._block.net[2].weight, self._block.net[2].bias)
            if rounded is None
            else self._outer(*rounded)
        )
