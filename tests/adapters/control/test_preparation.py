"""Hints made of photographs, against the libraries that ControlNets were trained with."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from latentdiff.adapters.control.preparation import prepared
from latentdiff.errors import MissingDependencyError, UsageError
from tests.tasks.images import an_image


def photograph() -> Image.Image:
    image = an_image(96, 64)
    image.paste((250, 40, 10), (20, 12, 60, 50))
    return image


@pytest.mark.parametrize("thresholds", [{}, {"low": 20, "high": 60}])
def test_canny_is_that_of_opencv(thresholds):
    cv2 = pytest.importorskip("cv2")
    found = np.asarray(prepared(photograph(), "canny", **thresholds))
    expected = cv2.Canny(np.asarray(photograph()), thresholds.get("low", 100), thresholds.get("high", 200))
    assert found.shape == (64, 96, 3) and set(np.unique(found)) == {0, 255}
    assert all(np.array_equal(found[..., channel], expected) for channel in range(3))


def test_tile_keeps_no_details():
    found = np.asarray(prepared(photograph(), "tile"), dtype=float)
    assert found.shape == (64, 96, 3)
    means = lambda image: np.asarray(image, dtype=float).reshape(8, 8, 12, 8, 3).mean((1, 3))  # noqa: E731
    fine = lambda image: np.abs(np.diff(np.asarray(image, dtype=float), axis=1)).max()  # noqa: E731
    assert np.abs(means(found) - means(photograph())).mean() < 6 and fine(found) < fine(photograph()) / 2
    flat = Image.new("RGB", (33, 17), (10, 200, 30))
    assert np.array_equal(np.asarray(prepared(flat, "tile")), np.asarray(flat))


def test_scribbles_are_broad_edges():
    pytest.importorskip("cv2")
    edges, strokes = (np.asarray(prepared(photograph(), kind))[..., 0] > 0 for kind in ("canny", "scribble"))
    assert 2 * edges.sum() < strokes.sum() < 0.5 * strokes.size


def blurred(sigma: float) -> np.ndarray:
    """By scipy: luminance from 0 to 1 under a Gaussian."""
    grey = np.asarray(photograph().convert("L"), dtype=np.float32) / 255
    return ndimage.gaussian_filter(grey, sigma, mode="mirror", truncate=4.0)


@pytest.mark.parametrize("sigma", [0.7, 1.0, 2.0])
def test_xdog_is_its_equation_over_the_gaussians_of_scipy(sigma):
    pytest.importorskip("cv2")
    difference = blurred(sigma) - 0.98 * blurred(1.6 * sigma)
    paper = np.where(difference >= -0.01, 1.0, 1 + np.tanh(100 * (difference + 0.01)))  # black lines on white
    found = np.asarray(prepared(photograph(), "xdog", sigma=sigma))[..., 0].astype(int)
    assert np.abs(found - (1 - paper) * 255).max() <= 4 and found.max() > 200 and (found == 0).mean() > 0.4


@pytest.mark.parametrize("sigma", [0.7, 1.0, 2.0])
def test_sobel_is_that_of_scipy(sigma):
    pytest.importorskip("cv2")
    slope = np.hypot(*(ndimage.sobel(blurred(sigma), axis, mode="mirror") for axis in (0, 1)))
    found = np.asarray(prepared(photograph(), "sobel", sigma=sigma))[..., 0].astype(int)
    assert np.abs(found - slope / slope.max() * 255).max() <= 1.5 and found.max() == 255


def test_flat_images_have_no_lines():
    pytest.importorskip("cv2")
    for grey in (0, 90, 255):
        flat = Image.new("RGB", (40, 30), (grey,) * 3)
        assert not any(np.asarray(prepared(flat, kind)).any() for kind in ("xdog", "sobel", "canny"))


@pytest.mark.parametrize("kind", ["pose", "openpose", "depth", "lineart", "softedge", "hed"])
def test_kinds_that_need_weights_say_what_to_do(kind):
    with pytest.raises(UsageError, match="controlnet_aux|prepare depth|xdog|sobel") as error:
        prepared(photograph(), kind)
    assert "\n" not in str(error.value)


def test_what_cannot_be_prepared(monkeypatch):
    with pytest.raises(UsageError, match="one of canny|preparation of canny"):
        prepared(photograph(), "magic")
    with pytest.raises(UsageError, match="0 <= low <= high"):
        prepared(photograph(), "canny", low=9, high=3)
    with pytest.raises(UsageError, match="sigma above 0"):
        prepared(photograph(), "sobel", sigma=0)
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'latentdiff\[control\]'") as error:
        prepared(photograph(), "canny")
    assert "\n" not in str(error.value)
