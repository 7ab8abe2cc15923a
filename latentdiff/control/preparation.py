"""Hints made of photographs, as ControlNets were trained on them."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

from latentdiff.errors import MissingDependencyError, UsageError
from latentdiff.reading.colours import as_rgb
from latentdiff.request.options import PREPARATIONS

LOW, HIGH = 100, 200  # thresholds of Canny's hysteresis, as the authors of ControlNet have them
TILE = 8  # times smaller, what a tile model sees


def prepared(image: Image.Image, kind: str, **options: Any) -> Image.Image:
    """The hint of one of `PREPARATIONS`, of the image's size.

    Args:
        options: `low` and `high` of "canny", `factor` of "tile".

    Raises:
        UsageError: there is no such kind.
        MissingDependencyError: what it needs is not installed.
    """
    if kind not in PREPARATIONS:
        raise UsageError(f"expected a preparation of {', '.join(PREPARATIONS)}, found {kind!r}")
    return _KINDS[kind](as_rgb(image), **options)


def canny(image: Image.Image, *, low: int = LOW, high: int = HIGH) -> Image.Image:
    """White edges on black (Canny 1986), by OpenCV.

    Args:
        low, high: thresholds of the gradient: an edge begins above `high` and goes on above `low`.
    """
    if not 0 <= low <= high:
        raise UsageError(f"expected thresholds 0 <= low <= high of canny, found {low} and {high}")
    edges = _opencv().Canny(np.asarray(image), low, high)
    return Image.fromarray(edges).convert("RGB")


def tile(image: Image.Image, *, factor: int = TILE) -> Image.Image:
    """The image without its details: reduced by area and enlarged again."""
    if factor < 1:
        raise UsageError(f"expected a factor of 1 or more of tile, found {factor}")
    small = tuple(max(1, round(side / factor)) for side in image.size)
    return image.resize((small[0], small[1]), Image.Resampling.BOX).resize(image.size, Image.Resampling.BICUBIC)


def scribble(image: Image.Image, *, low: int = LOW, high: int = HIGH) -> Image.Image:
    """Broad strokes: the edges of `canny`, widened and softened until they are lines of a thick pen."""
    opencv = _opencv()
    wide = opencv.dilate(np.asarray(canny(image, low=low, high=high).convert("L")), np.ones((5, 5), np.uint8))
    soft = opencv.GaussianBlur(wide, (0, 0), 3.0)
    return Image.fromarray(np.where(soft > 127, 255, 0).astype(np.uint8)).convert("RGB")


_KINDS = {"canny": canny, "scribble": scribble, "tile": tile}


def _opencv() -> Any:
    try:
        import cv2
    except ImportError as error:
        raise MissingDependencyError(
            "preparing edges needs OpenCV, which is not installed; pip install 'latentdiff[control]'"
        ) from error
    return cv2
