"""Attention by PyTorch's fused kernels."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

AttentionFunction = Callable[[Tensor, Tensor, Tensor], Tensor]  # (q, k, v) -> out, as `attention`


def sdpa_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention by the fastest kernel that PyTorch has for device, dtype and head size."""
    return scaled_dot_product_attention(q, k, v)
