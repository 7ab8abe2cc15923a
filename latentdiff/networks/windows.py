"""Predictions in overlapping windows, averaged where they overlap (MultiDiffusion, Bar-Tal et al. 2023, equation 5).

The model sees one window at a time, of the size that it was trained on, so that memory is bounded by the window and
things are drawn as large as it knows them.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from latentdiff.diffusion.guidance import Model
from latentdiff.networks.conditioning import AnyConditioning
from latentdiff.networks.rows import Area


@dataclass(frozen=True)
class Windows:
    """Windows over latents, in latents.

    side: of each, at most.
    stride: from one to the next.
    around: axes along which what lies beyond one edge is the other, "x", "y", "xy" or none.
    """

    side: int
    stride: int
    around: str = ""

    def cut(self, height: int, width: int) -> list[tuple[Tensor, Tensor]]:
        """The rows (h,) and columns (w,) of each window."""
        rows, columns = (self._along(side, axis in self.around) for side, axis in ((height, "y"), (width, "x")))
        return list(itertools.product(rows, columns))

    def covers(self, height: int, width: int) -> str:
        """The axes along which one window sees the whole."""
        return ("x" if width <= self.side else "") + ("y" if height <= self.side else "")

    def _along(self, length: int, is_around: bool) -> list[Tensor]:
        if length <= self.side:
            return [torch.arange(length)]
        if is_around:
            return [torch.arange(start, start + self.side) % length for start in range(0, length, self.stride)]
        starts = [*range(0, length - self.side, self.stride), length - self.side]
        return [torch.arange(start, start + self.side) for start in starts]


def windowed(model: Model, windows: Windows) -> Model:
    """The same model, which sees windows of latents (N, C, h, w) one after the other; outputs are averaged."""

    last: list[tuple[AnyConditioning, list[tuple[Area, AnyConditioning]]]] = []  # a walk asks with the same one again

    def average(x: Tensor, t: float, conditioning: AnyConditioning) -> Tensor:
        if not last or last[0][0] is not conditioning:
            areas = [(rows.to(x.device)[:, None], columns.to(x.device)) for rows, columns in windows.cut(*x.shape[-2:])]
            last[:] = [(conditioning, [(area, conditioning.cut(area)) for area in areas])]
        total: Tensor | None = None
        count = x.new_zeros(x.shape[-2:])
        for area, own in last[0][1]:
            out = model(x[..., *area], t, own).to(x.dtype)
            total = out.new_zeros(*out.shape[:2], *x.shape[-2:]) if total is None else total
            total[..., *area] += out
            count[area] += 1
        assert total is not None
        return total / count

    return average
