"""Attention in slices of queries, for little memory."""

from __future__ import annotations

import torch
from torch import Tensor

from latentdiff.networks.attention.plain import plain_attention

MAX_WEIGHTS = 2**24  # attention weights held at a time: 64 MiB in float32


def sliced_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention over as many queries at a time as keep the matrix of weights below `MAX_WEIGHTS` entries.

    Each query's softmax is whole, so the result does not depend on the slicing.
    """
    weights_per_query = q.shape[0] * q.shape[1] * k.shape[2]
    slice_length = max(1, MAX_WEIGHTS // weights_per_query)
    return torch.cat([plain_attention(part, k, v) for part in q.split(slice_length, dim=2)], dim=2)
