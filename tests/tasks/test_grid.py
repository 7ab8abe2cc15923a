from __future__ import annotations

import numpy as np
import pytest

from latentdiff.errors import UsageError
from latentdiff.request.axes import Axis, cells
from latentdiff.tasks.grid import draw_grid, grid_sheet
from tests import peers

STEPS, GUIDANCE, WORDS = map(Axis.parse, ("steps=2,3", "guidance-scale=1, 4.5", "prompt=cat|dog|red fox"))


def test_every_cell_is_the_image_of_its_settings():
    pipe = peers.ours("sd1")
    made = draw_grid(pipe, "a cat", [WORDS, STEPS, GUIDANCE], seed=4, width=32, height=48, progress=False)
    assert len(made) == 12
    own = pipe("a red fox", steps=2, guidance_scale=4.5, seed=4, width=32, height=48)[0]
    assert np.abs(np.asarray(made[2, 0, 1]).astype(int) - np.asarray(own)).max() <= 1


def test_the_sheet_has_the_images_in_their_places():
    pipe = peers.ours("sd1")
    axes = [STEPS, Axis.parse("seed=1,2,3"), GUIDANCE]
    made = draw_grid(pipe, "a cat", axes, width=64, height=64, progress=False)
    sheet = np.asarray(grid_sheet(made, axes))
    places = {}
    for key, image in made.items():
        found = np.asarray(image)
        views = np.lib.stride_tricks.sliding_window_view(sheet, found.shape)[:, :, 0]
        matches = np.argwhere((views[..., :4, :4, :] == found[:4, :4]).all((2, 3, 4)))
        [places[key]] = [(y, x) for y, x in matches if np.array_equal(sheet[y : y + 64, x : x + 64], found)]
    assert places[0, 0, 0] < places[0, 1, 0] < places[0, 2, 0] < places[0, 0, 1], "rows, then blocks, go down"
    for x, y, z in places:
        assert places[x, y, z][0] == places[0, y, z][0] and places[x, y, z][1] == places[x, 0, 0][1]


def test_labels():
    assert STEPS.labels == ["steps 2", "steps 3"] and GUIDANCE.labels == ["guidance scale 1", "guidance scale 4.5"]
    assert WORDS.labels == ["cat", "dog", "red fox"]
    assert Axis.parse("discard_penultimate=true,false").values == (True, False)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("step=3", "did you mean 'steps'"),
        ("steps", "expected an axis"),
        ("steps=", "expected values"),
        ("steps=3,3", "each once"),
        ("steps=three", "expected steps to be a whole number"),
        ("sampler=none", "expected sampler to be one of"),
        ("guidance_scale=nan", "finite"),
        ("callback=x", "expected an axis"),
    ],
)
def test_wrong_axes(text, message):
    with pytest.raises(UsageError, match=message):
        Axis.parse(text)


def test_axes_that_do_not_go_together():
    with pytest.raises(UsageError, match="does not hold 'cat'"):
        cells([WORDS], "a rocket", {})
    with pytest.raises(UsageError, match="each setting on one axis"):
        cells([STEPS, STEPS], "a cat", {})
    with pytest.raises(UsageError, match="at most 1,000"):
        cells([Axis("seed", tuple(range(1001)))], "a cat", {})
