"""Regions: prompts for parts of an image, by box, by words or by mask."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from os import PathLike
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from latentdiff.errors import UsageError
from latentdiff.image import as_rgb
from latentdiff.request.calls import public
from latentdiff.request.domains import Real
from latentdiff.request.options import REGION_WEIGHT
from latentdiff.request.recorded import RecordedRegion
from latentdiff.request.sources import ImageInput, open_source

Box = tuple[float, float, float, float]  # left, top, right, bottom, as shares of the image
WORDS = ("left", "right", "top", "bottom", "center")
_HALVES = {"left": (0.0, 0.5), "right": (0.5, 1.0), "top": (0.0, 0.5), "bottom": (0.5, 1.0)}
WHOLE: Box = (0.0, 0.0, 1.0, 1.0)


class Region:
    """A prompt for a part of an image.

    pipe("a meadow", regions=[Region("a cat", box="left"), Region("a dog", mask="dog.png")])
    """

    is_region: ClassVar[bool] = True  # what the domain of the option `regions` asks

    @public(weight=Real(0))
    def __init__(
        self,
        prompt: str,
        *,
        box: str | Sequence[float] | None = None,
        mask: ImageInput | None = None,
        weight: float = REGION_WEIGHT,
    ) -> None:
        """Say where it is, by a box or by a mask.

        Args:
            box: left, top, right and bottom as shares of width and height, 0 to 1; or words: left, right, top, bottom,
                center, or two of them, "top left".
            mask: an image in the proportions of what is made, white where the region is; grey is less of it.
            weight: how much it decides there, and the prompt for all the rest; 1 is alone. Where regions overlap and their
                weights add up to more than 1, they share.

        Raises:
            UsageError: neither or both of box and mask, or one that holds no place in the image.
            DataError: the mask's file is missing or no image.
        """
        if not isinstance(prompt, str):
            raise UsageError(f"expected the prompt of a region to be a text, found {prompt!r}")
        if (box is None) == (mask is None):
            found = "neither" if mask is None else "both"
            raise UsageError(f"expected a box or a mask for the region {prompt!r}, found {found}")
        if not weight:
            raise UsageError(f"expected a weight above 0 for the region {prompt!r}, found 0")
        self.prompt, self.weight, self.frame = prompt, weight, WHOLE
        self.box = None if box is None else read_box(box)
        source = None if mask is None else open_source(mask)
        self.entry = None if source is None else source.entry
        self.mask = None if source is None else as_rgb(source.image).convert("L")
        if self.mask is not None and self.mask.getbbox() is None:
            raise UsageError(f"the mask of the region {prompt!r} is black all over; expected white where the region is")

    def describe(self) -> RecordedRegion:
        """What a recipe holds of it."""
        box = None if self.box is None else list(self.box)
        return RecordedRegion(prompt=self.prompt, box=box, mask=self.entry, weight=self.weight)

    def map(self, height: int, width: int, factor: int = 1) -> Tensor:
        """How strongly it holds at each cell of latents, (height, width) float64: its weight times the share of the cell that
        lies in it.

        Args:
            factor: pixels to a cell.

        Raises:
            UsageError: its mask is of other proportions, by more than a cell, or holds no cell.
        """
        left, top, right, bottom = self.frame
        if self.mask is None:
            x0, y0, x1, y1 = self.box or WHOLE
            across = _overlap((x0 - left) / (right - left), (x1 - left) / (right - left), width)
            down = _overlap((y0 - top) / (bottom - top), (y1 - top) / (bottom - top), height)
            return self.weight * torch.outer(down, across)
        if self.frame == WHOLE:
            self._check_proportions(height * factor, width * factor, factor)
        part = left * self.mask.width, top * self.mask.height, right * self.mask.width, bottom * self.mask.height
        values = np.array(self.mask.resize((width, height), Image.Resampling.BOX, box=part), dtype=np.float64)
        if not values.any() and self.frame == WHOLE:
            size = f"{width * factor} x {height * factor}"
            raise UsageError(f"the mask of the region {self.prompt!r} is too fine for an image of {size} pixels")
        return self.weight * torch.from_numpy(values / 255.0)

    def cropped(self, box: tuple[int, int, int, int], size: tuple[int, int]) -> Region:
        """The same for a part of what is made, `box` (left, top, right, bottom) of an image of `size` in pixels.

        Raises:
            UsageError: its mask is of other proportions.
        """
        self._check_proportions(size[1], size[0], 1)
        own = copy(self)
        own.frame = (box[0] / size[0], box[1] / size[1], box[2] / size[0], box[3] / size[1])
        return own

    def _check_proportions(self, height: int, width: int, tolerance: int) -> None:
        if self.mask is not None and abs(self.mask.height * width / self.mask.width - height) > tolerance:
            raise UsageError(
                f"expected the mask of the region {self.prompt!r} in the proportions of what is made, {width} x {height} "
                f"pixels, found {self.mask.width} x {self.mask.height}"
            )

    def __repr__(self) -> str:
        """Its prompt and its place."""
        return f"<Region {self.prompt!r}, {self.box or 'by a mask'}, weight {self.weight:g}>"


def read_box(place: Any) -> Box:
    """A box from four numbers or from words.

    Raises:
        UsageError: it is neither, or has no place in the image.
    """
    if isinstance(place, str):
        return _of_words(place)
    try:
        x0, y0, x1, y1 = (float(side) for side in place)
    except (TypeError, ValueError):
        raise UsageError(f"expected the box of a region as four numbers x0,y0,x1,y1 or as words, found {place!r}") from None
    if not (0.0 <= x0 < x1 <= 1.0 and 0.0 <= y0 < y1 <= 1.0):
        raise UsageError(
            f"expected the box of a region within the image, as shares 0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1, found "
            f"{x0:g},{y0:g},{x1:g},{y1:g}"
        )
    return x0, y0, x1, y1


def _of_words(text: str) -> Box:
    words = text.replace("-", " ").replace("centre", "center").split()
    across = [word for word in words if word in ("left", "right")]
    down = [word for word in words if word in ("top", "bottom")]
    unknown = [word for word in words if word not in WORDS]
    if not words or unknown or len(across) > 1 or len(down) > 1 or len(words) > 2 or len(set(words)) < len(words):
        raise UsageError(f"expected the words {', '.join(WORDS)}, or two of them as in 'top left', found {text!r}")
    middle = (0.25, 0.75) if "center" in words else (0.0, 1.0)
    x0, x1 = _HALVES[across[0]] if across else middle
    y0, y1 = _HALVES[down[0]] if down else middle
    return x0, y0, x1, y1


def _overlap(start: float, end: float, cells: int) -> Tensor:
    """The share of each of `cells` equal parts of 0 to 1 that lies from `start` to `end`, (cells,) float64."""
    edges = torch.arange(cells + 1, dtype=torch.float64)
    inside = edges.clamp(start * cells, end * cells) if start < end else edges * 0.0
    return inside.diff()


def regions_again(recorded: Sequence[RecordedRegion], place_of: Callable[[str], str | PathLike[str]]) -> list[Region]:
    """The regions of a recipe once more.

    Args:
        place_of: a role, see `recipe.Recipe.roles` -> the file.
    """
    return [
        Region(
            entry.prompt,
            box=entry.box,
            mask=None if entry.mask is None else place_of(f"region_mask{number}"),
            weight=entry.weight,
        )
        for number, entry in enumerate(recorded, 1)
    ]
