"""The networks' fast forms for inference on an x86 CPU: the same mathematics up to rounding, by other routines.

Which routine is faster depends on the processor, so that each form is tried against torch's when its size first comes
by, see `latentdiff.networks.kernels`. `use_fast_forms` gives each module of a network its fast form as an
attribute `forward` of that one object: names, weights, hooks and taps stay as they are. Where gradients are recorded,
or in another dtype or on another device, the plain forward computes.

`docs/performance.md` says what each form gains on which processor, `python tools/bench.py --only forms` measures it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from latentdiff.engines import form_trials as trials
from latentdiff.networks.kernels import NEEDED, as_matrix, has_product, has_taps, product, takes_fast_form, windows
from latentdiff.networks.layers import FeedForward, ResnetBlock, Upsample

MIN_ROWS = 16  # below, a product is bound by reading its weights, whoever computes it
MAX_MAP = 512  # pixels of a batch, up to which a convolution is faster as one matrix product
MAX_KERNELS = 2**22  # numbers of a weight that are added up at a time: the sums are memory beside the weights
FORMATS = (torch.float32, torch.bfloat16, torch.float16)
FF_ROWS = 1024  # tokens that go through a feed-forward at a time, per thread
# Kinds of sizes within which one choice holds, see `form_trials`.
FEW_ROWS = 256
SMALL_MAPS = (32, 128, 512)  # pixels of a batch, at most
LARGE_MAPS = (1024, 512)  # at least
LARGE_KERNEL = 2**23  # bytes
# How many times as fast as torch's a form must be in its trial, where that differs from the network; see there.
LARGE_KERNEL_NEEDED = {32: 0.6, 128: 0.6, 512: 0.75}
FEED_FORWARD_NEEDED = 1.2
UPSAMPLING_NEEDED = {torch.float32: 0.5, torch.bfloat16: 1.0}


def use_fast_forms(network: nn.Module) -> None:
    """Give every module of `network` its fast form, where it has one.

    Convolutions keep their weights in the order (O, h, w, I) from now on, which makes all feature maps channels-last:
    tokens and maps are then the same memory, and no layer reorders its input. Values do not change.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last)
        if type(module) in _FAST_FORMS:
            module.forward = partial(_fast_or_plain, _FAST_FORMS[type(module)], module)


def use_plain_forms(network: nn.Module) -> None:
    """Make `network` what it was before `use_fast_forms`."""
    for module in network.modules():
        module.__dict__.pop("forward", None)
        if isinstance(module, nn.Conv2d):
            module.weight.data = module.weight.data.contiguous()


def _fast_or_plain(fast: Callable[..., Tensor | None], module: Any, x: Tensor, *arguments: Any, **named: Any) -> Tensor:
    """The fast form's result; that of the plain one where there is none for this input, or the plain one is faster."""
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
    # Of most modules the weight is at hand; `parameters()` looks through them for a fortieth of a step.
    weight = module.weight if isinstance(module, (nn.Linear, nn.Conv2d)) else next(module.parameters())
    is_dense = type(weight) in (nn.Parameter, Tensor)  # and not quantized, say
    return x.device.type == "cpu" and x.dtype == weight.dtype and x.dtype in FORMATS and is_dense


def _is_foreign(dtype: torch.dtype) -> bool:
    """Whether the processor has no instructions for this format, which torch's routines then take up to 100 times as
    long in as in float32."""
    return dtype != torch.float32 and not has_product(dtype)


def fastest_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (..., I), weight (O, I) -> x weightᵀ + bias by oneDNN, or by torch's linear layer where that is faster."""
    rows = x.numel() // x.shape[-1]
    if rows >= MIN_ROWS and has_product(x.dtype) and _is_faster_linear(rows, x.dtype):
        return product(x, weight, bias)
    if rows >= MIN_ROWS and _is_foreign(x.dtype):
        trial = partial(trials.widened_linear, widened_product, x.dtype)
        if takes_fast_form(f"widened linear {_short(x.dtype)}", trial):
            return widened_product(x, weight, bias)
    return F.linear(x, weight, bias)


def _is_faster_linear(rows: int, dtype: torch.dtype) -> bool:
    few = rows <= FEW_ROWS
    form = f"linear {_short(dtype)} {'few' if few else 'many'} rows"
    return takes_fast_form(form, partial(trials.linear, few, dtype))


def widened_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A linear layer in float32, rounded to the format of its weights at the end."""
    return F.linear(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)


def _linear(layer: nn.Linear, x: Tensor) -> Tensor:
    return fastest_product(x, layer.weight, layer.bias)


def _conv(layer: nn.Conv2d, x: Tensor) -> Tensor | None:
    """1x1 as a matrix product over the pixels; 3x3 likewise where the map is small.

    oneDNN's convolution reorders its weights at every call, which takes longer than the arithmetic on maps of a few
    hundred pixels; a product over the unfolded map does not.
    """
    if _is_foreign(x.dtype):
        trial = partial(trials.widened_convolution, widened_convolution, x.dtype)
        is_faster = takes_fast_form(f"widened convolution {_short(x.dtype)}", trial)
        return widened_convolution(layer, x) if is_faster else None
    if layer.groups != 1 or layer.dilation != (1, 1) or layer.stride != (1, 1):
        return None
    pixels = x.shape[0] * x.shape[2] * x.shape[3]
    if layer.kernel_size == (1, 1) and layer.padding == (0, 0):
        form, trial = f"1x1 convolution {_short(x.dtype)}", partial(trials.pointwise, pointwise, x.dtype)
        return pointwise(layer, x) if takes_fast_form(form, trial) else None
    if layer.kernel_size == (3, 3) and layer.padding == (1, 1) and pixels <= MAX_MAP and layer.in_channels >= 64:
        return small_convolution(layer, x) if _is_faster_convolution(pixels, layer.weight) else None
    return None


def _is_faster_convolution(pixels: int, weight: Tensor) -> bool:
    most = next(most for most in SMALL_MAPS if pixels <= most)
    is_large = weight.numel() * weight.element_size() >= LARGE_KERNEL
    form = f"3x3 convolution {_short(weight.dtype)} up to {most} pixels{', large kernel' if is_large else ''}"
    needed = LARGE_KERNEL_NEEDED[most] if is_large else NEEDED
    return takes_fast_form(form, partial(trials.convolution, small_convolution, most, weight.dtype), needed)


def widened_convolution(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """A convolution in float32, rounded to the format of its weights at the end."""
    bias = None if layer.bias is None else layer.bias.float()
    stride, padding, dilation = layer.stride, layer.padding, layer.dilation
    return F.conv2d(x.float(), layer.weight.float(), bias, stride, padding, dilation, layer.groups).to(x.dtype)


def pointwise(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """A 1x1 convolution as a matrix product over the pixels."""
    return _to_map(fastest_product(_channels_last(x), layer.weight.flatten(1), layer.bias))


def small_convolution(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """A 3x3 convolution with padding as one matrix product."""
    pixels = F.pad(_channels_last(x), (0, 0, 1, 1, 1, 1))
    return _to_map(fastest_product(windows(pixels, 3, 3), as_matrix(layer.weight), layer.bias))


def resnet_block(block: ResnetBlock, x: Tensor, time: Tensor | None = None) -> Tensor | None:
    """SiLU and the sum with the residual in place: new memory for a large map costs as much as either.

    The routines are torch's, so that this is bit for bit the same, and needs no trial.
    """
    if has_taps(*block.children()):
        return None
    h = block.conv1(F.silu(block.norm1(x), inplace=True))
    if block.time_emb_proj is not None:
        h += block.time_emb_proj(F.silu(time))[:, :, None, None]
    h = block.conv2(F.silu(block.norm2(h), inplace=True))
    return h.add_(x if block.conv_shortcut is None else block.conv_shortcut(x))


def _upsample(block: Upsample, x: Tensor, size: torch.Size | None = None) -> Tensor | None:
    height, width = x.shape[-2:]
    pixels = x.shape[0] * height * width
    if size not in (None, (2 * height, 2 * width)) or pixels < MAX_MAP or has_taps(block.conv) or _is_foreign(x.dtype):
        return None
    least = next(least for least in LARGE_MAPS if pixels >= least)
    form = f"upsampling {_short(x.dtype)} from {least} pixels"
    trial = partial(trials.upsample, folded_upsample, least, x.dtype)
    return folded_upsample(block, x) if takes_fast_form(form, trial, UPSAMPLING_NEEDED[x.dtype]) else None


def folded_upsample(block: Upsample, x: Tensor) -> Tensor:
    """Convolve the small map, once for each of the four places of a pixel in the doubled one: 4 in place of 9 products.

    Of the three rows that the kernel sees in the doubled map, two are the same row of the small one, so their weights
    are added; columns likewise. Faster from 16x16 on, where adding the weights takes less time than it saves.
    """
    height, width = x.shape[-2:]
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


def feed_forward(block: FeedForward, x: Tensor) -> Tensor | None:
    """In pieces of as many tokens as the caches hold, so that the inner activations, eight times as wide, never go to
    memory."""
    if has_taps(*block.children()):
        return None
    rows = FF_ROWS * torch.get_num_threads()
    form, trial = f"feed-forward {_short(x.dtype)}", partial(trials.feed_forward, gated_in_product, x.dtype)
    is_gated = has_product(x.dtype) and takes_fast_form(form, trial, FEED_FORWARD_NEEDED)
    piecewise = gated_in_product if is_gated else _gated
    if not is_gated and x.shape[0] * x.shape[1] <= rows:
        return None
    out = torch.empty_like(x)
    for piece, result in zip(x.flatten(0, 1).split(rows), out.flatten(0, 1).split(rows), strict=True):
        result.copy_(piecewise(block, piece))
    return out


def gated_in_product(block: FeedForward, x: Tensor) -> Tensor:
    """x (L, C) -> (L, C), with value and gate as products of their own and GELU inside the second: nothing is
    strided."""
    inner, outer = block.net[0].proj, block.net[2]
    (value, gate), (value_bias, gate_bias) = inner.weight.chunk(2), inner.bias.chunk(2)
    hidden = product(x, value, value_bias).mul_(product(x, gate, gate_bias, "gelu"))
    return product(hidden, outer.weight, outer.bias)


def _gated(block: FeedForward, x: Tensor) -> Tensor:
    inner, outer = block.net[0].proj, block.net[2]
    value, gate = fastest_product(x, inner.weight, inner.bias).chunk(2, dim=-1)
    return fastest_product(F.gelu(gate).mul_(value), outer.weight, outer.bias)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _channels_last(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1).contiguous()  # (N, C, h, w) -> (N, h, w, C)


def _to_map(x: Tensor) -> Tensor:
    return x.permute(0, 3, 1, 2)  # (N, h, w, C) -> (N, C, h, w), in the same memory


_FAST_FORMS: dict[type[nn.Module], Callable[..., Tensor | None]] = {
    nn.Linear: _linear,
    nn.Conv2d: _conv,
    ResnetBlock: resnet_block,
    Upsample: _upsample,
    FeedForward: feed_forward,
}
