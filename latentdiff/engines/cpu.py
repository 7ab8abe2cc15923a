"""The networks' fast forms for inference on an x86 CPU: the same mathematics up to rounding, by other routines.

torch leaves float32 matrix products on a CPU to MKL, which runs at half the speed of oneDNN on processors of other
makers; a fast form calls oneDNN, and orders the work so that intermediate results stay in the caches. `accelerate`
gives each module of a network its fast form as an attribute `forward` of that one object: names, weights, hooks and
taps stay as they are. Where gradients are recorded, or in another dtype or on another device, a fast form calls the
plain one.

Every form's gain was measured on the shapes of Stable Diffusion 1.5 on one core of a Zen 5; see `docs/performance.md`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from latentdiff.networks.attention.chunked import onednn_products
from latentdiff.networks.layers.resnet import ResnetBlock, Upsample
from latentdiff.networks.layers.transformer import FeedForward

MIN_ROWS = 16  # below, a product is bound by reading its weights, whoever computes it
MAX_MAP = 512  # pixels of a batch, up to which a convolution is faster as one matrix product
MAX_KERNELS = 2**22  # numbers of a weight that are added up at a time: the sums are memory beside the weights
FF_ROWS = 1024  # tokens that go through a feed-forward at a time, per thread


def accelerate(network: nn.Module) -> None:
    """Give every module of `network` its fast form, where it has one and this machine can run it.

    Convolutions keep their weights in the order (O, h, w, I) from now on, which makes all feature maps channels-last:
    tokens and maps are then the same memory, and no layer reorders its input. Values do not change.
    """
    if not onednn_products():
        return
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last)
        if type(module) in _FAST_FORMS:
            module.forward = partial(_fast_or_plain, _FAST_FORMS[type(module)], module)


def restore(network: nn.Module) -> None:
    """Make `network` what it was before `accelerate`."""
    for module in network.modules():
        module.__dict__.pop("forward", None)
        if isinstance(module, nn.Conv2d):
            module.weight.data = module.weight.data.contiguous()


def _fast_or_plain(fast: Callable[..., Tensor | None], module: Any, x: Tensor, *arguments: Any, **named: Any) -> Tensor:
    """The fast form's result; that of the plain one where there is none for this input."""
    out = fast(module, x, *arguments, **named) if _is_inference(module, x) else None
    return type(module).forward(module, x, *arguments, **named) if out is None else out


def _is_inference(module: nn.Module, x: Tensor) -> bool:
    if (
        torch.is_grad_enabled()
        or torch.is_autocast_enabled("cpu")
        or torch.jit.is_tracing()
        or torch.compiler.is_compiling()
    ):
        return False
    weight = next(module.parameters())
    is_dense = type(weight) in (nn.Parameter, Tensor)  # and not quantized, say
    return (
        x.device.type == "cpu" and x.dtype == weight.dtype and x.dtype in (torch.float32, torch.bfloat16) and is_dense
    )


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, then: str = "none") -> Tensor:
    """x (..., I), weight (O, I) -> x weightᵀ + bias by oneDNN, followed by "gelu" if that is asked for."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, then, [], "none" if then == "gelu" else "")


def _linear(layer: nn.Linear, x: Tensor) -> Tensor | None:
    """float32: 1.7 to 2.7 times as fast as MKL; bf16: the same routine that torch calls."""
    return _product(x, layer.weight, layer.bias) if x.numel() >= MIN_ROWS * layer.in_features else None


def _conv(layer: nn.Conv2d, x: Tensor) -> Tensor | None:
    """1x1 as a matrix product over the pixels (float32: 2.4 times as fast); 3x3 likewise where the map is small.

    oneDNN's convolution reorders its weights at every call, which takes longer than the arithmetic on maps of a few
    hundred pixels: unfolding the map instead is 2 times as fast on 8x8 pixels of 1280 channels, 1.1 times on 16x16.
    """
    if layer.kernel_size == (1, 1) and layer.stride == (1, 1) and layer.padding == (0, 0):
        return _to_map(_product(_channels_last(x), layer.weight.flatten(1), layer.bias))
    is_small = x.shape[0] * x.shape[2] * x.shape[3] <= MAX_MAP and layer.in_channels >= 64
    if layer.kernel_size == (3, 3) and layer.stride == (1, 1) and layer.padding == (1, 1) and is_small:
        pixels = F.pad(_channels_last(x), (0, 0, 1, 1, 1, 1))
        return _window_product(pixels, layer.weight, layer.bias)
    return None


def _window_product(pixels: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Convolve pixels (N, H, W, I) by weight (O, I, a, b), without padding, as one matrix product -> (N, O, H-a+1,
    W-b+1)."""
    count, height, width, channels = pixels.shape
    a, b = weight.shape[-2:]
    n, row, column, channel = pixels.stride()
    windows = pixels.as_strided(
        (count, height - a + 1, width - b + 1, a, b, channels), (n, row, column, row, column, channel)
    )  # (N, h, w, a, b, I)
    return _to_map(_product(windows.flatten(3), weight.permute(0, 2, 3, 1).flatten(1), bias))


def _resnet_block(block: ResnetBlock, x: Tensor, time: Tensor | None = None) -> Tensor | None:
    """SiLU and the sum with the residual in place: new memory for a large map costs as much as either."""
    if any(map(_has_taps, block.children())):
        return None
    h = block.conv1(F.silu(block.norm1(x), inplace=True))
    if block.time_emb_proj is not None:
        h += block.time_emb_proj(F.silu(time))[:, :, None, None]
    h = block.conv2(F.silu(block.norm2(h), inplace=True))
    return h.add_(x if block.conv_shortcut is None else block.conv_shortcut(x))


def _upsample(block: Upsample, x: Tensor, size: torch.Size | None = None) -> Tensor | None:
    """Convolve the small map, once for each of the four places of a pixel in the doubled one: 4 in place of 9 products.

    Of the three rows that the kernel sees in the doubled map, two are the same row of the small one, so their weights
    are added; columns likewise. Faster from 16x16 on, where adding the weights takes less time than it saves.
    """
    height, width = x.shape[-2:]
    if size not in (None, (2 * height, 2 * width)) or x.shape[0] * height * width < MAX_MAP or _has_taps(block.conv):
        return None
    weight, bias = block.conv.weight.permute(0, 2, 3, 1), block.conv.bias  # (O, 3, 3, I), as it lies in memory
    shape = (x.shape[0], weight.shape[0], 2 * height, 2 * width)
    out = torch.empty(shape, dtype=x.dtype, memory_format=torch.channels_last)
    padded = F.pad(x, (1, 1, 1, 1))
    outputs = max(1, MAX_KERNELS // weight[0].numel())
    for some in map(slice, range(0, len(weight), outputs), range(outputs, len(weight) + outputs, outputs)):
        for i in range(2):
            rows = _halves(weight[some], i, dim=1)
            for j in range(2):
                kernel = _halves(rows, j, dim=2).permute(0, 3, 1, 2)  # (some of O, I, 2, 2)
                part = padded[:, :, i : i + height + 1, j : j + width + 1]
                out[:, some, i::2, j::2] = F.conv2d(part, kernel, bias[some])
    return out


def _halves(weight: Tensor, place: int, dim: int) -> Tensor:
    """Three weights along `dim` -> the two that act on the small map, for the first or the second of two equal
    pixels."""
    a, b, c = weight.unbind(dim)
    return torch.stack([a, b + c] if place == 0 else [a + b, c], dim)


def _feed_forward(block: FeedForward, x: Tensor) -> Tensor | None:
    """Value and gate as products of their own, GELU inside the second: nothing is strided; float32 2.7, bf16 1.9 times
    as fast.

    In pieces of as many tokens as the caches hold, so that the inner activations, eight times as wide, never go to
    memory.
    """
    if any(map(_has_taps, block.children())):
        return None
    inner, outer = block.net[0].proj, block.net[2]
    value, gate = inner.weight.chunk(2)
    value_bias, gate_bias = inner.bias.chunk(2)
    out = torch.empty_like(x)
    rows = FF_ROWS * torch.get_num_threads()
    for piece, result in zip(x.flatten(0, 1).split(rows), out.flatten(0, 1).split(rows), strict=True):
        hidden = _product(piece, value, value_bias).mul_(_product(piece, gate, gate_bias, "gelu"))
        result.copy_(_product(hidden, outer.weight, outer.bias))
    return out


def _channels_last(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1).contiguous()  # (N, C, h, w) -> (N, h, w, C)


def _to_map(x: Tensor) -> Tensor:
    return x.permute(0, 3, 1, 2)  # (N, h, w, C) -> (N, C, h, w), in the same memory


def _has_taps(module: nn.Module) -> bool:
    """Whether somebody reads or changes what passes through or inside `module`."""
    return any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())


_FAST_FORMS: dict[type[nn.Module], Callable[..., Tensor | None]] = {
    nn.Linear: _linear,
    nn.Conv2d: _conv,
    ResnetBlock: _resnet_block,
    Upsample: _upsample,
    FeedForward: _feed_forward,
}
