"""Attention by xFormers' memory-efficient kernels (Lefaudeux et al. 2022), CUDA only."""

from __future__ import annotations

from torch import Tensor

from latentdiff.errors import MissingDependencyError, UsageError


def xformers_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention by xFormers.

    Raises:
        UsageError: the tensors are not on a CUDA device; xFormers has no kernels for others.
        MissingDependencyError: xFormers is not installed.
    """
    if q.device.type != "cuda":
        raise UsageError(
            f"attention back end xformers needs a CUDA device, found {q.device.type}; use --attention sdpa"
        )
    try:
        from xformers.ops import memory_efficient_attention
    except ImportError as error:
        raise MissingDependencyError("xformers is not installed; run: pip install 'latentdiff[xformers]'") from error
    # xFormers keeps the heads after the tokens: (N, L, heads, d).
    out = memory_efficient_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return out.transpose(1, 2)
