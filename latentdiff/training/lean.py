"""Layers that train on a CPU in less time and memory, with the same numbers to rounding.

    with lean_layers(unet, text_encoder): ...

Inside, linear layers and 1x1 convolutions multiply by oneDNN in place of BLAS (MKL is half as fast on AMD processors),
3x3 convolutions of few pixels are products of matrices, and the cheap activations between two multiplications
(normalisation and SiLU, value times GELU) are computed again in the backward pass in place of being kept. The modules
stay the same objects with the same parameters and hooks; only their class changes, and back at the end. In other
precisions, on other devices, and where somebody listens to a layer inside, they compute as always. For inference, see
`latentdiff.engines.fast_forms`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn import functional as F

from latentdiff.networks.kernels import as_matrix, has_product, has_taps, product, windows
from latentdiff.networks.layers import FeedForward, ResnetBlock

# Up to so many pixels in a batch of maps, the gradient of a 3x3 kernel is one product with the pixels' surroundings:
# oneDNN's own gradient is as fast for more, and up to eight times slower for the fewest.
_SOME_PIXELS = 512
# Up to so many, that holds for the forward pass and the gradient of the input too: memory for the kernel is what takes
# time.
_FEW_PIXELS = 128
# From so many numbers on, the insides of a feed-forward layer are not kept but computed again: 16 MiB.
_MANY_NUMBERS = 2**22


@contextmanager
def lean_layers(*networks: nn.Module) -> Iterator[None]:
    """Inside, the layers of `networks` compute as this module says, where the processor is one that gains by it."""
    changed: list[tuple[nn.Module, type]] = []
    if has_product(torch.float32):
        for network in networks:
            for module in network.modules():
                if (lean := _lean_class(module)) is not None:
                    changed.append((module, type(module)))
                    module.__class__ = lean
    try:
        yield
    finally:
        for module, plain in changed:
            module.__class__ = plain


_WINDOW_1 = ((1, 1), (1, 1), (0, 0), (1, 1), 1)
_WINDOW_3 = ((3, 3), (1, 1), (1, 1), (1, 1), 1)


def _lean_class(module: nn.Module) -> type[nn.Module] | None:
    if type(module) is nn.Conv2d:
        window = (module.kernel_size, module.stride, module.padding, module.dilation, module.groups)
        return {_WINDOW_1: _Pointwise, _WINDOW_3: _Convolution}.get(window) if module.padding_mode == "zeros" else None
    return {nn.Linear: _Linear, ResnetBlock: _ResnetBlock, FeedForward: _FeedForward}.get(type(module))


def _applies(x: Tensor, weight: Tensor) -> bool:
    fits = x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32 and x.numel() > 0
    return fits and not torch.is_autocast_enabled("cpu")


# --- Layers -----------------------------------------------------------------------------------------------------------


class _Linear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return _LinearFunction.apply(x, self.weight, self.bias) if _applies(x, self.weight) else super().forward(x)


class _Pointwise(nn.Conv2d):
    """A 1x1 convolution is a linear layer over the pixels."""

    def forward(self, x: Tensor) -> Tensor:
        if not _applies(x, self.weight):
            return super().forward(x)
        return _LinearFunction.apply(x.permute(0, 2, 3, 1), self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


class _Convolution(nn.Conv2d):
    """A 3x3 convolution with padding."""

    def forward(self, x: Tensor) -> Tensor:
        if not _applies(x, self.weight):
            return super().forward(x)
        return _ConvolutionFunction.apply(x, self.weight, self.bias)


class _ResnetBlock(ResnetBlock):
    def forward(self, x: Tensor, time: Tensor | None = None) -> Tensor:
        if not _applies(x, self.conv1.weight) or has_taps(self.norm1, self.conv1, self.norm2, self.conv2):
            return super().forward(x, time)
        h = _norm_silu_conv(x, self.norm1, self.conv1)
        if self.time_emb_proj is not None:
            h = h + self.time_emb_proj(F.silu(time))[:, :, None, None]
        h = _norm_silu_conv(h, self.norm2, self.conv2)
        return (x if self.conv_shortcut is None else self.conv_shortcut(x)) + h


class _FeedForward(FeedForward):
    def forward(self, x: Tensor) -> Tensor:
        gated, _, out = self.net
        if not _applies(x, out.weight) or has_taps(gated, gated.proj, out):
            return super().forward(x)
        return _GatedFunction.apply(x, gated.proj.weight, gated.proj.bias, out.weight, out.bias)


def _norm_silu_conv(x: Tensor, norm: nn.GroupNorm, conv: nn.Conv2d) -> Tensor:
    return _NormSiluConvFunction.apply(x, norm.weight, norm.bias, conv.weight, conv.bias, norm.num_groups, norm.eps)


# --- Their mathematics ------------------------------------------------------------------------------------------------


def _gradients(needed: Sequence[bool], x: Tensor, weight: Tensor, gradient: Tensor) -> tuple[Tensor | None, ...]:
    """Of input (..., in), weight (out, in) and bias of a linear layer, for the gradient (..., out) of its output."""
    flat, rows = gradient.flatten(0, -2), x.flatten(0, -2)
    of_input = product(gradient, weight.t()) if needed[0] else None
    of_weight = product(flat.t(), rows.t()) if needed[1] else None
    return of_input, of_weight, flat.sum(0) if needed[2] else None


class _LinearFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        return product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        return _gradients(ctx.needs_input_grad, gradient if x is None else x, weight, gradient)


def _convolve(x: Tensor, kernel: Tensor, bias: Tensor | None) -> Tensor:
    if _pixels(x) > _FEW_PIXELS:
        return torch.conv2d(x, kernel, bias, padding=1)
    return _to_maps(product(_patches(x), as_matrix(kernel), bias), x)


def _convolution_gradients(needed: Sequence[bool], x: Tensor, kernel: Tensor, gradient: Tensor) -> list[Tensor | None]:
    """Of input (n, in, h, w), kernel (out, in, 3, 3) and bias, for the gradient (n, out, h, w) of a convolution's
    output."""
    found: list[Tensor | None] = [None, None, None]
    by_product = _pixels(x) <= _FEW_PIXELS, _pixels(x) <= _SOME_PIXELS, _pixels(x) <= _SOME_PIXELS
    if any(left := [wanted and not done for wanted, done in zip(needed, by_product, strict=True)]):
        ones = (1, 1)
        found = list(
            torch.ops.aten.convolution_backward(
                gradient, x, kernel, [kernel.shape[0]], ones, ones, ones, False, (0, 0), 1, left
            )
        )
    rows = gradient.permute(0, 2, 3, 1).flatten(0, 2)  # (n h w, out)
    if needed[0] and by_product[0]:
        found[0] = _sum_of_patches(product(rows, as_matrix(kernel).t()), x)
    if needed[1] and by_product[1]:
        found[1] = product(rows.t(), _patches(x).t()).unflatten(1, (3, 3, -1)).permute(0, 3, 1, 2)
    if needed[2] and by_product[2]:
        found[2] = rows.sum(0)
    return found


def _pixels(x: Tensor) -> int:
    return x.numel() // x.shape[1]


def _to_maps(rows: Tensor, like: Tensor) -> Tensor:
    """(n h w, C) -> (n, C, h, w), channels last."""
    return rows.view(like.shape[0], *like.shape[2:], -1).permute(0, 3, 1, 2)


def _patches(x: Tensor) -> Tensor:
    """The surroundings of each pixel of maps (n, C, h, w), with zeros beyond the border: (n h w, 9 C)."""
    padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1)).contiguous()
    return windows(padded, 3, 3).flatten(0, 2)


def _sum_of_patches(patches: Tensor, like: Tensor) -> Tensor:
    """The transpose of `_patches`: each pixel's sum over the patches it lies in, (n, C, h, w)."""
    count, channels, height, width = like.shape
    patches = patches.view(count, height, width, 3, 3, channels)
    padded = patches.new_zeros(count, height + 2, width + 2, channels)
    for row in range(3):
        for column in range(3):
            padded[:, row : row + height, column : column + width] += patches[:, :, :, row, column]
    return padded[:, 1:-1, 1:-1].permute(0, 3, 1, 2)


class _ConvolutionFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, kernel: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, kernel)
        return _convolve(x, kernel, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, kernel = ctx.saved_tensors
        return tuple(_convolution_gradients(ctx.needs_input_grad, x, kernel, gradient))


class _NormSiluConvFunction(torch.autograd.Function):
    """conv(silu(group norm(x))), of which the input alone is kept."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, x: Tensor, scale: Tensor, shift: Tensor, kernel: Tensor, bias: Tensor, groups: int, eps: float
    ) -> Tensor:
        x = x.contiguous(memory_format=_memory_format(x))
        normed, mean, rstd = _group_norm(x, scale, shift, groups, eps)
        ctx.save_for_backward(x, scale, shift, kernel, mean, rstd)
        ctx.groups, ctx.eps = groups, eps
        return _convolve(F.silu(normed, inplace=True), kernel, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, shift, kernel, mean, rstd = ctx.saved_tensors
        for_x, for_scale, for_shift, for_kernel, for_bias, *_ = ctx.needs_input_grad
        normed, _, _ = _group_norm(x, scale, shift, ctx.groups, ctx.eps)
        inside = for_x or for_scale or for_shift
        active = F.silu(normed) if for_kernel else normed
        of_active, of_kernel, of_bias = _convolution_gradients((inside, for_kernel, for_bias), active, kernel, gradient)
        if not inside:
            return None, None, None, of_kernel, of_bias, None, None
        of_normed = torch.ops.aten.silu_backward(of_active, normed).contiguous(memory_format=_memory_format(x))
        count, channels, height, width = x.shape
        # torch's kernel for maps with channels last needs a place for the gradient of its input (a crash in torch
        # 2.13).
        of_x, of_scale, of_shift = torch.ops.aten.native_group_norm_backward(
            of_normed, x, mean, rstd, scale, count, channels, height * width, ctx.groups, [True, for_scale, for_shift]
        )
        return of_x if for_x else None, of_scale, of_shift, of_kernel, of_bias, None, None


def _memory_format(x: Tensor) -> torch.memory_format:
    """The order that the kernels of group norms read and write."""
    return torch.channels_last if x.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format


def _group_norm(x: Tensor, scale: Tensor, shift: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    count, channels, height, width = x.shape
    return torch.native_group_norm(x, scale, shift, count, channels, height * width, groups, eps)


class _GatedFunction(torch.autograd.Function):
    """linear(value * gelu(gate)) of value, gate = linear(x), of which the two halves alone are kept, or nothing but
    x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, inner: Tensor, inner_bias: Tensor, outer: Tensor, outer_bias: Tensor) -> Tensor:
        both = product(x, inner, inner_bias)
        value, gate = both.chunk(2, dim=-1)
        ctx.save_for_backward(x, both if both.numel() < _MANY_NUMBERS else None, inner, inner_bias, outer)
        return product(F.gelu(gate).mul_(value), outer, outer_bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, both, inner, inner_bias, outer = ctx.saved_tensors
        both = product(x, inner, inner_bias) if both is None else both
        for_x, for_inner, for_inner_bias, for_outer, for_outer_bias = ctx.needs_input_grad
        value, gate = both.chunk(2, dim=-1)
        gated = F.gelu(gate)
        active = gated * value if for_outer else gated
        of_active, of_outer, of_outer_bias = _gradients((True, for_outer, for_outer_bias), active, outer, gradient)
        of_gate = torch.ops.aten.gelu_backward(of_active * value, gate)
        of_both = torch.cat([of_active.mul_(gated), of_gate], dim=-1)
        of_x, of_inner, of_inner_bias = _gradients((for_x, for_inner, for_inner_bias), x, inner, of_both)
        return of_x, of_inner, of_inner_bias, of_outer, of_outer_bias
