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
SIGMA = 1.0  # pixels of blur, under which there are no lines
_WIDER, _SHARE, _LEVEL, _STEEPNESS = 1.6, 0.98, -0.01, 100.0  # of XDoG: k, tau, epsilon and phi

# What people ask for that needs weights which are not here, and what they can do.
_ELSEWHERE = {
    "pose": "poses need a detector; make the image with one, such as OpenposeDetector of the package controlnet_aux, and "
    "give it as the hint itself",
    "depth": "depths need a model; make the image with: latentdiff control prepare depth IMAGE --model FOLDER --out FILE",
    "lineart": "the network that drew lineart for those models is not here; xdog draws lines without one",
    "softedge": "the network HED that found soft edges for those models is not here; sobel finds some without one",
}
_ELSEWHERE |= {"openpose": _ELSEWHERE["pose"], "dwpose": _ELSEWHERE["pose"], "hed": _ELSEWHERE["softedge"]}


def prepared(image: Image.Image, kind: str, **options: Any) -> Image.Image:
    """The hint of one of `PREPARATIONS`, of the image's size.

    Args:
        options: `low` and `high` of "canny" and "scribble", `sigma` of "xdog" and "sobel", `factor` of "tile".

    Raises:
        UsageError: there is no such kind.
        MissingDependencyError: what it needs is not installed.
    """
    if kind in _ELSEWHERE:
        raise UsageError(_ELSEWHERE[kind])
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


def xdog(image: Image.Image, *, sigma: float = SIGMA) -> Image.Image:
    """White lines on black where an image darkens, by an extended difference of Gaussians (Winnemoeller et al. 2012,
    "XDoG", eq. 3 and 5): a classical drawing, not what the network for lineart would draw.

    Args:
        sigma: of the narrower Gaussian, in pixels; lines are about so broad.
    """
    grey = _grey(image)
    difference = _blurred(grey, sigma) - _SHARE * _blurred(grey, _WIDER * sigma)
    ink = np.where(difference >= _LEVEL, 0.0, -np.tanh(_STEEPNESS * (difference - _LEVEL)))
    return _as_hint(ink)


def sobel(image: Image.Image, *, sigma: float = SIGMA) -> Image.Image:
    """Soft white edges on black: the size of the gradient, by Sobel's operator on the blurred image; the strongest is white.

    Args:
        sigma: of the blur, in pixels.
    """
    opencv, grey = _opencv(), _blurred(_grey(image), sigma)
    slope = np.hypot(opencv.Sobel(grey, -1, 1, 0), opencv.Sobel(grey, -1, 0, 1))
    return _as_hint(slope / max(float(slope.max()), 1e-3))


def _grey(image: Image.Image) -> np.ndarray:
    """Luminance from 0 to 1, (H, W) float32."""
    return np.asarray(image.convert("L"), dtype=np.float32) / 255


def _blurred(grey: np.ndarray, sigma: float) -> np.ndarray:
    if not 0 < sigma <= 100:
        raise UsageError(f"expected a sigma above 0 and up to 100, found {sigma}")
    return _opencv().GaussianBlur(grey, (0, 0), sigma)


def _as_hint(values: np.ndarray) -> Image.Image:
    """Numbers (H, W) from 0 to 1 as an image of greys."""
    return Image.fromarray((values * 255).round().astype(np.uint8)).convert("RGB")


_KINDS = {"canny": canny, "scribble": scribble, "xdog": xdog, "sobel": sobel, "tile": tile}


def _opencv() -> Any:
    try:
        import cv2
    except ImportError as error:
        raise MissingDependencyError(
            "preparing edges needs OpenCV, which is not installed; pip install 'latentdiff[control]'"
        ) from error
    return cv2
