"""The back end that suits device, dtype and size."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

from latentdiff.networks.attention.chunked import chunked_attention, chunked_is_possible
from latentdiff.networks.attention.fastest import cuda_attention
from latentdiff.networks.kernels.choice import takes_fast_form

MIN_SCORES = 3 * 2**13  # of one head; below, `chunked` takes longer to start than it saves
_TRIED = 2**25  # multiplications of a trial, of one head
_KEYS = 2**17  # numbers of a head's keys in a trial, unless there are few keys
_QUERIES = (64, 512)  # of a trial, at least and at most


def auto_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """On a GPU what is fastest there; on a CPU chunked products for inference where they are faster, or PyTorch's
    own."""
    if q.is_cuda:
        return cuda_attention(q, k, v)
    is_large = q.shape[2] * k.shape[2] > MIN_SCORES
    backend = chunked_attention if is_large and chunked_is_possible(q) and _is_faster(q, k, v) else sdpa
    return backend(q, k, v)


def _is_faster(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether chunks are faster for these keys; tried with as many heads as there are threads, some of the
    queries and most of the keys, since both forms take time in proportion to these."""
    least, most = _QUERIES
    keys = min(k.shape[2], max(most, _KEYS // k.shape[3]))
    queries = min(q.shape[2], max(least, min(most, _TRIED // (2 * keys * k.shape[3]))))

    def trial() -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
        heads = min(q.shape[1], torch.get_num_threads())
        few = q[:1, :heads, :queries], k[:1, :heads, :keys], v[:1, :heads, :keys]
        return lambda: sdpa(*few), lambda: chunked_attention(*few)

    dtype = str(q.dtype).removeprefix("torch.")
    return takes_fast_form(f"attention {dtype} {queries} queries {k.shape[2]} keys of {k.shape[3]}", trial)
