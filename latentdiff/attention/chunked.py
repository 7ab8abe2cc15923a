"""Attention on a CPU as matrix products over a few hundred queries at a time, for inference.

torch's fused kernel leaves its products on a CPU to MKL, which runs at half the speed of oneDNN on processors of other makers,
and computes bf16 in float32; torch's softmax spends most of its time in MKL's `exp`. Here oneDNN multiplies, scores stay in
float32, and `exp2` is torch's own.
"""

from __future__ import annotations

import math
import platform
from itertools import product as combinations

import torch
from torch import Tensor

MAX_SCORES = 2**19  # scores held at a time per thread, 2 MiB: larger blocks come fresh from the system at every call
SAFE_EXPONENT = 64.0  # 2^±64 times any number of keys and values is an ordinary float32 and bf16


def chunked_is_possible(q: Tensor) -> bool:
    """Whether `chunked_attention` computes this: float32 or bf16 on an x86 CPU, where no gradients are recorded."""
    is_inference = not torch.is_grad_enabled() and not torch.jit.is_tracing() and not torch.compiler.is_compiling()
    return is_inference and q.device.type == "cpu" and q.dtype in (torch.float32, torch.bfloat16) and onednn_products()


def onednn_products() -> bool:
    """Whether torch offers oneDNN's matrix product here."""
    on_x86 = platform.machine().lower() in ("x86_64", "amd64")
    return on_x86 and torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


@torch.no_grad()
def chunked_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention in chunks of queries; each query's softmax is whole, so the result does not depend on the chunks.

    softmax(s) v = (e v) / (e 1) with e = 2^(s - max s), where the scale and log2(e) are in the queries already and the sum is
    one more column of the product with v: the division then acts on (L, d) in place of (L, S) numbers. The maximum only keeps
    e in range, so it is left out where |s| <= |q| |k| says that no e can leave it.
    """
    batch, heads, length, size = q.shape
    keys = k.shape[2]
    q = (q.float() * (math.log2(math.e) / math.sqrt(size))).contiguous()
    k = k.float().contiguous()
    v = torch.cat([v.transpose(2, 3), v.new_ones(batch, heads, 1, keys)], dim=2)  # (N, heads, d + 1, S)
    is_safe = (q.norm(dim=3).amax(2) * k.norm(dim=3).amax(2) <= SAFE_EXPONENT).tolist()
    out = torch.empty(batch, length, heads, size, dtype=v.dtype)
    rows = max(16, MAX_SCORES * torch.get_num_threads() // keys)
    for n, head, start in combinations(range(batch), range(heads), range(0, length, rows)):
        part = slice(start, start + rows)
        sums = _weighted_sums(q[n, head, part], k[n, head], v[n, head], is_safe[n][head])
        torch.div(sums[:, :size], sums[:, size:], out=out[n, part, head])
    return out.transpose(1, 2)


def _weighted_sums(q: Tensor, k: Tensor, v: Tensor, is_safe: bool) -> Tensor:
    """q (rows, d), k (S, d), v (d + 1, S) -> (rows, d + 1).

    A function of its own, so that the scores are freed before the next ones are made: those then take the same memory, which
    is in the caches.
    """
    product = torch.ops.mkldnn._linear_pointwise  # (a, b) -> a bᵀ
    scores = product(q, k, None, "none", [], "")
    if not is_safe:
        scores -= scores.amax(dim=1, keepdim=True)
    return product(scores.exp2_().to(v.dtype), v, None, "none", [], "")
