"""oneDNN's matrix product, which torch has under a private name, and convolutions as products.

No other file names `torch.ops.mkldnn`. Where a release of torch lacks the operation, or the processor one of its
formats (bfloat16 without AVX-512, say), torch's public functions compute the same.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

_THEN = {"none": lambda x: x, "gelu": F.gelu, "sigmoid": torch.sigmoid}


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None, then: str = "none") -> Tensor:
    """x weightᵀ + bias, followed by an activation: by oneDNN where it can, or else by torch.

    Args:
        x: (..., I) on a CPU.
        weight: (O, I).
        bias: (O,) or None.
        then: "none", "gelu" or "sigmoid".

    Returns:
        (..., O).
    """
    if not has_product(x.dtype):
        return _THEN[then](F.linear(x, weight, bias))
    return _operation()(x, weight, bias, then, [], "none" if then == "gelu" else "")


@cache
def has_product(dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies numbers of this format here."""
    operation = _operation()
    if operation is None or dtype not in (torch.float32, torch.bfloat16):
        return False
    try:
        x = torch.ones(16, 32, dtype=dtype)
        return all(bool((operation(x, x, None, then, [], "none") == 32.0).all()) for then in ("none", "gelu"))
    except RuntimeError:  # "could not create a primitive descriptor", say
        return False


@cache
def _operation() -> Callable[..., Tensor] | None:
    is_x86 = platform.machine().lower() in ("x86_64", "amd64")
    if not is_x86 or not torch.backends.mkldnn.is_available():
        return None
    return getattr(torch.ops.mkldnn, "_linear_pointwise", None)


def windows(pixels: Tensor, height: int, width: int) -> Tensor:
    """The windows of pixels (N, H, W, C), one from each place: (N, H - height + 1, W - width + 1, height width C)."""
    count, rows, columns, channels = pixels.shape
    of_map, of_row, of_column, of_channel = pixels.stride()
    shape = (count, rows - height + 1, columns - width + 1, height, width, channels)
    return pixels.as_strided(shape, (of_map, of_row, of_column, of_row, of_column, of_channel)).flatten(3)


def as_matrix(kernel: Tensor) -> Tensor:
    """(O, I, a, b) -> (O, a b I), what `windows` are multiplied by; no copy where it lies with channels last."""
    return kernel.permute(0, 2, 3, 1).flatten(1)
