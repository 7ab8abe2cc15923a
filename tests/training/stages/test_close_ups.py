import json

import numpy as np
import pytest

from latentdiff.errors import DataError
from latentdiff.training.data import read_dataset
from latentdiff.training.stages.close_ups import close_up_turn, read_close_ups
from tests.training.build import captioned_folder


def folder(tmp_path, *scenes):
    """A folder whose scenes hold things with the given boxes (left, top, right, bottom) in pixels."""
    made = captioned_folder(tmp_path / "scenes", len(scenes))
    lines = (made / "metadata.jsonl").read_text().splitlines()
    things = [[{"box": box, "text": f"thing {n}"} for n, box in enumerate(boxes)] for boxes in scenes]
    lines = [json.dumps(json.loads(line) | {"scene": {"objects": o}}) for line, o in zip(lines, things, strict=True)]
    (made / "metadata.jsonl").write_text("\n".join(lines))
    return read_dataset([made])


def test_crops_hold_their_thing_and_as_little_as_possible_of_others(tmp_path):
    data = folder(tmp_path, [[2, 36, 54, 88], [74, 36, 126, 88]], [[22, 22, 106, 106]], [[4, 4, 124, 124]])
    small, middle, large = read_close_ups(data, 16, 8)
    assert (small.side, middle.side, large.side) == (8, 12, 16)
    assert (large.scenes[0], large.tops[0], large.lefts[0], large.captions[0]) == (2, 0, 0, "thing 0")
    assert small.captions == ("thing 0", "thing 1") and middle.captions == ("thing 0",)
    assert list(small.scenes) == [0, 0] and list(middle.scenes) == [1]
    assert list(small.lefts) == [0, 8]  # neither sees the other
    for top, left in zip(small.tops, small.lefts, strict=True):
        assert 0 <= top <= 8 and 0 <= left <= 8
    assert (middle.tops[0], middle.lefts[0]) == (2, 2)


def test_crops_stand_on_the_grid_of_the_lowest_level_where_they_can(tmp_path):
    """A thing of 52 pixels half an image from another, shifted by a latent or not."""
    scenes = [[[x, 34, x + 52, 86], [x + 64, 34, x + 116, 86]] for x in (2, 10)]
    (small,) = read_close_ups(folder(tmp_path, *scenes), 16, 8)
    assert list(small.lefts) == [0, 8, 0, 8] and list(small.tops) == [4, 4, 4, 4]


def test_crops_are_cut_from_the_latents(tmp_path):
    (small,) = read_close_ups(folder(tmp_path, [[2, 36, 54, 88], [74, 36, 126, 88]]), 16, 8)
    latents = np.arange(4 * 256, dtype=np.float16).reshape(1, 4, 16, 16)
    crops = small.crop(latents[[0, 0]], np.array([1, 0]))
    assert crops.shape == (2, 4, 8, 8)
    top, left = small.tops[1], small.lefts[1]
    assert np.array_equal(crops[0], latents[0, :, top : top + 8, left : left + 8])


@pytest.mark.parametrize("share", [0.25, 0.5, 2 / 3])
def test_turns_come_evenly_and_are_counted(share):
    turns = [turn for step in range(60) if (turn := close_up_turn(step, share)) is not None]
    assert turns == list(range(len(turns))) and len(turns) == pytest.approx(60 * share, abs=1)


def test_no_close_ups_without_a_share():
    assert all(close_up_turn(step, 0.0) is None for step in range(100))


def test_metadata_without_places_is_refused(tmp_path):
    with pytest.raises(DataError, match="box"):
        read_close_ups(folder(tmp_path, [None]), 16, 8)
    with pytest.raises(DataError, match="a `scene` of 0.png in metadata.jsonl"):
        read_close_ups(read_dataset([captioned_folder(tmp_path / "plain", 3)]), 16, 8)
