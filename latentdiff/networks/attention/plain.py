"""Attention as the equation reads: the reference that the other back ends are tested against."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor

AttentionFunction = Callable[[Tensor, Tensor, Tensor], Tensor]  # (q, k, v) -> out, as `attention`


def plain_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention with its full matrix of weights, (N, heads, L, S), in memory."""
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])  # (N, heads, L, S)
    return scores.softmax(dim=-1) @ v
