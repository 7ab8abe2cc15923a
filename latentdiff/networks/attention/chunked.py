"""Attention on a CPU as matrix products over a few hundred queries at a time, for inference.

torch's fused kernel leaves float32 products on a CPU to MKL, which is slow on some processors of other makers, and
computes bf16 in float32 where there is no AMX. Here oneDNN multiplies, and the exponential is torch's `exp2` or, in
bf16, part of the product. `auto` tries which of the two is faster.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product as combinations

import torch
from torch import Tensor

from latentdiff.networks.kernels import product

MAX_SCORES = (
    2**19
)  # float32 scores held at a time per thread, 2 MiB: larger blocks come fresh from the system at every call
SAFE_SCORE = 44.0  # e^±44 times any number of keys and values is an ordinary float32 and bf16
MARGIN = 8.0  # sigmoid(-8) is e^-8 but for a share of 3e-4, a sixth of what rounding to bf16 may change


@torch.no_grad()
def chunked_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention in chunks of queries; each query's softmax is whole, so the result does not depend on the chunks.

    softmax(s) v = (e v) / (e 1) with e = exp(s - c), where c may be any number of the query's, the scale is in the keys
    already, and the sum is one more column of the product with v: the division then acts on (L, d) in place of (L, S)
    numbers.
    """
    batch, heads, length, size = q.shape
    out = torch.empty(batch, length, heads, size, dtype=v.dtype)
    for n, head in combinations(range(batch), range(heads)):
        _attend(q[n, head], k[n, head], v[n, head], out[n, :, head])
    return out.transpose(1, 2)


def _attend(q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> None:
    """One head: queries (L, d), keys and values (S, d) -> out (L, d). All that is made here fits into the caches."""
    size, dtype = q.shape[1], v.dtype
    q, k = q.contiguous(), k.float()
    # A score that all keys share changes nothing; without it, the greatest score of a query is 0 or more.
    k = (k - k.mean(dim=0)) / math.sqrt(size)
    v = torch.cat([v.transpose(0, 1), v.new_ones(1, len(k))])  # (d + 1, S)
    bound = float(torch.linalg.vector_norm(q, dim=1, dtype=k.dtype).amax() * k.norm(dim=1).amax())  # |s| <= |q| |k|
    exponentials, rows = _exponentials(k, bound, dtype)
    for some, result in zip(q.split(rows), out.split(rows), strict=True):
        # The exponentials are freed here before the next ones are made, which then take the same memory, in the caches.
        sums = product(exponentials(some), v)
        torch.div(sums[:, :size], sums[:, size:], out=result)


def _exponentials(k: Tensor, bound: float, dtype: torch.dtype) -> tuple[Callable[[Tensor], Tensor], int]:
    """What makes of queries (rows, d) the exponentials (rows, S) of their scores in `dtype`, and for how many rows at a
    time.

    The maximum only keeps them in range, so it is left out where `bound` says that no score can leave it. oneDNN then
    computes bf16 without a pass over the scores: far below 0 the sigmoid, which it can apply to a product, is exp.
    """
    rows = max(16, MAX_SCORES * torch.get_num_threads() // len(k))
    is_safe = bound <= SAFE_SCORE
    if is_safe and dtype == torch.bfloat16:
        keys, shift = k.to(dtype), torch.full((len(k),), -bound - MARGIN, dtype=dtype)
        return lambda q: product(q, keys, shift, "sigmoid"), 2 * rows
    keys = k * math.log2(math.e)
    return lambda q: _powers_of_two(product(q.float(), keys), is_safe).to(dtype), rows


def _powers_of_two(scores: Tensor, is_safe: bool) -> Tensor:
    """scores (rows, S) -> 2^(score - c), in place; c is the greatest score of the row unless all are safe."""
    if not is_safe:
        scores -= scores.amax(dim=1, keepdim=True)
    return scores.exp2_()
