"""The back end that suits device, dtype and size."""

from __future__ import annotations

from torch import Tensor

from latentdiff.networks.attention.chunked import chunked_attention, chunked_is_possible
from latentdiff.networks.attention.fastest import cuda_attention
from latentdiff.networks.attention.sdpa import sdpa_attention

MIN_SCORES = 3 * 2**13  # of one head; below, `chunked` takes longer to start than it saves


def auto_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """On a GPU what is fastest there; on a CPU chunked products for inference unless the map is tiny, or PyTorch's
    own."""
    if q.is_cuda:
        return cuda_attention(q, k, v)
    is_large = q.shape[2] * k.shape[2] > MIN_SCORES
    backend = chunked_attention if is_large and chunked_is_possible(q) else sdpa_attention
    return backend(q, k, v)
