"""What steers a U-Net beside text and latents, on the rows of one batch: what it adds, where, and at which timesteps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from latentdiff.networks.layers import Context, Further

Area = tuple[Tensor, Tensor]  # rows (h, 1) and columns (w,) of latents


class Rows:
    """One thing that steers; each kind adds in one of these ways, and nothing in the others."""

    @classmethod
    def cat(cls, parts: Sequence[Any]) -> Self:
        """Join along the batch."""
        raise NotImplementedError

    def residuals(self, x: Tensor, t: float, text: Context, dtype: torch.dtype) -> list[Tensor] | None:
        """What is added to the skips from the first to the last, and to the middle, for latents (N, C, h, w)."""
        return None

    def cut(self, area: Area) -> Self:
        """The same for a part of the latents; what adds at places has to cut it out."""
        return self

    def attends(self, t: float) -> bool:
        """Whether `attended` adds anything."""
        return False

    def attended(self, dtype: torch.dtype) -> Mapping[nn.Module, Further]:
        """What cross-attentions attend to besides the text."""
        return {}

    def features(self, t: float, dtype: torch.dtype) -> Mapping[str, Tensor]:
        """What is added to the outputs of modules on the way down, by their names."""
        return {}


def acts_at(window: tuple[float, float], t: float) -> bool:
    """Whether the timestep t lies in a window of `window_of`."""
    low, high = window
    return low < t <= high


def window_of(timesteps: Sequence[float], start: float, end: float) -> tuple[float, float]:
    """The timesteps low < t <= high of the share `start` to `end` of a walk; as diffusers counts, a step acts that lies
    wholly within.

    Args:
        timesteps: that are visited, in any order; repeated ones count once.
    """
    visited = sorted(set(timesteps), reverse=True)
    count = len(visited)
    inside = [i for i in range(count) if not (i / count < start or (i + 1) / count > end)]
    if not inside:
        return float("inf"), float("inf")
    first, last = inside[0], inside[-1]
    return (
        visited[last + 1] if last + 1 < count else -1.0,
        float("inf") if first == 0 else visited[first],
    )
