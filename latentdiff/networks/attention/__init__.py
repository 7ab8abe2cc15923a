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

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from latentdiff.errors import UsageError
from latentdiff.networks.attention.auto import auto_attention
from latentdiff.networks.attention.plain import AttentionFunction, plain_attention
from latentdiff.networks.attention.sliced import sliced_attention
from latentdiff.networks.attention.xformers import xformers_attention

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
