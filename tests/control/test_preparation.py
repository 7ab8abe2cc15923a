"""Hints made of photographs, against the libraries that ControlNets were trained with."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from PIL import Image

from latentdiff.control.preparation import prepared
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


def test_what_cannot_be_prepared(monkeypatch):
    with pytest.raises(UsageError, match="one of canny|preparation of canny"):
        prepared(photograph(), "magic")
    with pytest.raises(UsageError, match="0 <= low <= high"):
        prepared(photograph(), "canny", low=9, high=3)
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'latentdiff\[control\]'") as error:
        prepared(photograph(), "canny")
    assert "\n" not in str(error.value)
