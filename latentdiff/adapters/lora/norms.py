"""A limit on how much adapters change weights, while they are trained."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from latentdiff.adapters.lora.kinds import Change
from latentdiff.adapters.lora.kinds.relative import DoRA


@torch.no_grad()
def limit_norms(changes: Iterable[Change], largest: float) -> None:
    """Scale products down whose norm (Frobenius, of alpha / rank up down) is larger, as `scale_weight_norms` of kohya's
    scripts does: each of n factors by the nth root of what is too much. Of a DoRA, that of its LoRA counts.
    """
    for change in changes:
        inner = change.inner if isinstance(change, DoRA) else change
        share = (largest / inner.weight_change(None).norm()).clamp(max=1.0)
        factors = list(inner.parameters())
        for factor in factors:
            factor.mul_(share ** (1 / len(factors)))
