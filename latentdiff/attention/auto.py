"""The back end that suits device, dtype and size."""

from __future__ import annotations

from torch import Tensor

from latentdiff.attention.chunked import chunked_attention, chunked_is_possible
from latentdiff.attention.sdpa import sdpa_attention

MIN_SCORES = 2**14  # of one head; below, `chunked` takes longer to start than it saves


def auto_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The chunked products for inference on a CPU unless the map is tiny, else PyTorch's fused kernels."""
    is_large = q.shape[2] * k.shape[2] > MIN_SCORES
    backend = chunked_attention if is_large and chunked_is_possible(q) else sdpa_attention
    return backend(q, k, v)
