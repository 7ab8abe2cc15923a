"""Prompts for parts of an image (Jiménez 2023, "Mixture of Diffusers"): the U-Net sees each region on its own, with its own
prompt, as if it were an image of that size, and the predictions are blended where they lie.

So an object stands in its region whole. Where one prediction of the whole image for each prompt is blended by masks, or where
cross-attentions are masked, a model composes for the whole image, and the borders of the regions cut what it composed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from latentdiff.diffusion.guidance import Model
from latentdiff.errors import UsageError
from latentdiff.networks.conditioning import AnyConditioning, Conditioning


@dataclass(frozen=True)
class View:
    """What is seen of the latents, and how much is taken of it: rows and columns, and shares (1, 1, h', w') of these."""

    rows: slice
    columns: slice
    share: Tensor

    def of(self, x: Tensor) -> Tensor:
        """That part of (..., h, w)."""
        return x[..., self.rows, self.columns]


@dataclass(frozen=True)
class AppliedRegion:
    """A region on one walk: its text, (1, L, C), and where it acts."""

    text: Tensor
    view: View


@dataclass(frozen=True)
class Regions:
    """The regions of one walk, and the share (1, 1, h, w) of the prompt for all; None if nothing is left for that."""

    regions: tuple[AppliedRegion, ...]
    common: Tensor | None

    @classmethod
    def of(cls, maps: Sequence[Tensor], texts: Sequence[Tensor], least: int) -> Regions | None:
        """Of maps (h, w) that say how strongly each text holds, 0 or more: where they add up to less than 1, the prompt
        for all has the rest, and where to more, they share. Texts whose maps are 0 everywhere are left out; None if all are.

        Args:
            least: cells that a region's view has at least on each side, where the image has them.
        """
        total = torch.stack(list(maps)).sum(0)
        found = []
        for map_, text in zip(maps, texts, strict=True):
            if map_.any():
                rows, columns = (_reach(map_.any(axis), least) for axis in (1, 0))
                share = (map_ / total.clamp(min=1.0))[rows, columns].float()
                found.append(AppliedRegion(text, View(rows, columns, share[None, None].to(text.device))))
        rest = (1.0 - total).clamp(min=0.0).float()
        device = texts[0].device
        return cls(tuple(found), rest[None, None].to(device) if rest.any() else None) if found else None


@dataclass(frozen=True)
class RegionalConditioning:
    """The conditionings of the same rows for the whole image and for each region."""

    whole: AnyConditioning
    common: Tensor | None
    parts: tuple[tuple[View, AnyConditioning], ...]

    def __len__(self) -> int:
        return len(self.whole)

    @staticmethod
    def cat(several: Sequence[RegionalConditioning]) -> RegionalConditioning:
        """Join those of the same regions along the batch."""
        parts = zip(*(one.parts for one in several), strict=True)
        return RegionalConditioning(
            Conditioning.cat([one.whole for one in several]),
            several[0].common,
            tuple((same[0][0], Conditioning.cat([part for _, part in same])) for same in parts),
        )


def regional_model(model: Model) -> Model:
    """The model for `RegionalConditioning`."""

    def blended(x: Tensor, t: float, conditioning: Any) -> Tensor:
        found = torch.zeros_like(x)
        if conditioning.common is not None:
            found += conditioning.common.to(x) * model(x, t, conditioning.whole).to(x.dtype)
        for view, own in conditioning.parts:
            view.of(found).add_(view.share.to(x) * model(view.of(x), t, own).to(x.dtype))
        return found

    return blended


def check_is_plain(is_plain: bool) -> None:
    """Raise a UsageError for prompts of several parts."""
    if not is_plain:
        raise UsageError("regions go with prompts without AND and without a weight at the end; leave one of them out")


def _reach(is_in: Tensor, least: int) -> slice:
    """The interval of what is in, widened evenly to `least` places as far as there are so many."""
    places = is_in.nonzero()
    first, last, size = int(places[0]), int(places[-1]) + 1, len(is_in)
    length = min(max(least, last - first), size)
    start = min(max(0, first - (length - (last - first)) // 2), size - length)
    return slice(start, start + length)
