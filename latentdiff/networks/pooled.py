"""Pooled text beside the embeddings of the tokens, in one tensor.

A model of two text encoders (SDXL) is told a text by the states of its tokens and by one vector for the whole. Both are
kept as one tensor (N, L + 1, C) whose last row is that vector, filled up with zeros: whatever mixes, caches, optimises or
saves embeddings then treats the two alike.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def with_pooled(tokens: Tensor, pooled: Tensor) -> Tensor:
    """Token embeddings (N, L, C) and pooled text (N, P), P at most C -> (N, L + 1, C)."""
    row = F.pad(pooled, (0, tokens.shape[2] - pooled.shape[1]))
    return torch.cat([tokens, row[:, None].to(tokens)], dim=1)


def split_pooled(text: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Inverse of `with_pooled`: (N, L, C) and (N, width)."""
    return text[:, :-1], text[:, -1, :width]


def joined_chunks(chunks: list[Tensor], *, pooled: bool) -> Tensor:
    """The embeddings of a text's chunks, each (N, L, C), along the sequence; the pooled text is the first one's."""
    if not pooled:
        return torch.cat(chunks, dim=1)
    return torch.cat([*(chunk[:, :-1] for chunk in chunks), chunks[0][:, -1:]], dim=1)
