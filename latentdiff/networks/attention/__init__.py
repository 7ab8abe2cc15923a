"""Scaled dot-product attention behind one function, with interchangeable back ends.

| back end   | where    | memory in the number of tokens L         |
|------------|----------|------------------------------------------|
| `auto`     | anywhere | linear: on a CPU `chunked` or `sdpa`, on |
|            |          | a GPU the fastest that was found there   |
| `sdpa`     | anywhere | what PyTorch picks, mostly linear        |
| `xformers` | CUDA     | linear; needs the extra `xformers`       |
| `sliced`   | anywhere | one slice of queries at a time           |
| `plain`    | anywhere | quadratic; the reference of the tests    |

A new back end is one file with a function `(q, k, v) -> out` and one line in `ATTENTION_BACKENDS`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from latentdiff.errors import UsageError
from latentdiff.networks.attention.chunked import chunked_attention
from latentdiff.networks.attention.fastest import cuda_attention
from latentdiff.networks.attention.plain import AttentionFunction, plain_attention
from latentdiff.networks.attention.sliced import sliced_attention
from latentdiff.networks.attention.xformers import xformers_attention
from latentdiff.networks.kernels import has_product, takes_fast_form

MIN_SCORES = 3 * 2**13  # of one head; below, `chunked` takes longer to start than it saves
_TRIED = 2**25  # multiplications of a trial, of one head
_KEYS = 2**17  # numbers of a head's keys in a trial, unless there are few keys
_QUERIES = (64, 512)  # of a trial, at least and at most


def auto_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """On a GPU what is fastest there; on a CPU chunked products for inference where they are faster, or PyTorch's own."""
    if q.is_cuda:
        return cuda_attention(q, k, v)
    is_large = q.shape[2] * k.shape[2] > MIN_SCORES
    if is_large and _is_inference_on_cpu(q) and _is_faster(q, k, v):
        return chunked_attention(q, k, v)
    return scaled_dot_product_attention(q, k, v)


def _is_inference_on_cpu(q: Tensor) -> bool:
    """Whether `chunked_attention` computes this: float32 or bf16 on an x86 CPU, where no gradients are recorded."""
    is_inference = not torch.is_grad_enabled() and not torch.jit.is_tracing() and not torch.compiler.is_compiling()
    return is_inference and q.device.type == "cpu" and has_product(q.dtype)


def _is_faster(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether chunks are faster for these keys; tried with as many heads as there are threads, some of the
    queries and most of the keys, since both forms take time in proportion to these."""
    least, most = _QUERIES
    keys = min(k.shape[2], max(most, _KEYS // k.shape[3]))
    queries = min(q.shape[2], max(least, min(most, _TRIED // (2 * keys * k.shape[3]))))

    def trial() -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
        heads = min(q.shape[1], torch.get_num_threads())
        few = q[:1, :heads, :queries], k[:1, :heads, :keys], v[:1, :heads, :keys]
        return lambda: scaled_dot_product_attention(*few), lambda: chunked_attention(*few)

    dtype = str(q.dtype).removeprefix("torch.")
    return takes_fast_form(f"attention {dtype} {queries} queries {k.shape[2]} keys of {k.shape[3]}", trial)


ATTENTION_BACKENDS: dict[str, AttentionFunction] = {
    "auto": auto_attention,
    "sdpa": scaled_dot_product_attention,
    "xformers": xformers_attention,
    "sliced": sliced_attention,
    "plain": plain_attention,
}

_backend: ContextVar[AttentionFunction] = ContextVar("attention_backend", default=auto_attention)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q kᵀ / √d) v (Vaswani et al. 2017, eq. 1) by the back end in use.

    Args:
        q: queries (N, heads, L, d).
        k: keys (N, heads, S, d).
        v: values (N, heads, S, d).

    Returns:
        (N, heads, L, d), dtype of `q`.
    """
    # torch.compile cannot read a context variable, and makes kernels of its own of PyTorch's attention.
    return scaled_dot_product_attention(q, k, v) if torch.compiler.is_compiling() else _backend.get()(q, k, v)


@contextmanager
def use_attention_backend(name: str) -> Iterator[None]:
    """Compute all attention inside the `with` block by the back end `name`.

    Raises:
        UsageError: there is no such back end.
    """
    if name not in ATTENTION_BACKENDS:
        raise UsageError(f"unknown attention back end {name!r}; choose one of {', '.join(ATTENTION_BACKENDS)}")
    token = _backend.set(ATTENTION_BACKENDS[name])
    try:
        yield
    finally:
        _backend.reset(token)


def attention_backend() -> str:
    """The name of the back end in use."""
    return next(name for name, function in ATTENTION_BACKENDS.items() if function is _backend.get())
