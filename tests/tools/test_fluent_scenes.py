from __future__ import annotations

import json
import sys
import tarfile
from pathlib import Path
from random import Random

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from latentdiff.errors import MissingDependencyError
from latentdiff.evaluation.rules import relations

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import fluent_glyphs  # noqa: E402
import fluent_language  # noqa: E402
import fluent_scenes  # noqa: E402

GLYPHS = ROOT / "tests" / "glyphs"
NOUNS = ("cat", "rocket", "apple", "grapes", "umbrella")  # the glyphs that are committed
SIZE = 128

randoms = st.integers(0, 2**32).map(Random)
kinds = st.sampled_from(list(fluent_language.KINDS))
glyphs = fluent_glyphs.Glyphs(GLYPHS)


@pytest.fixture(autouse=True, scope="module")
def few_nouns():
    """A world of the nouns whose glyphs are committed."""
    everything = dict(fluent_language.NOUNS)
    for noun in set(everything) - set(NOUNS):
        del fluent_language.NOUNS[noun]
    yield
    fluent_language.NOUNS.clear()
    fluent_language.NOUNS.update(everything)


def drawn(kind, rng):
    """A plan of the kind with enough contrast, its image and the boxes."""
    while True:
        plan = fluent_language.draw_plan(rng, "train", kind)
        if (scene := fluent_scenes.compose(plan, rng, SIZE, glyphs)) is not None:
            return plan, *scene


@settings(max_examples=60, deadline=None)
@given(randoms, kinds)
def test_things_are_inside_apart_and_related(rng, kind):
    plan, image, boxes = drawn(kind, rng)
    assert image.shape == (SIZE, SIZE, 3) and image.dtype == np.uint8 and len(boxes) == len(plan.things)
    for left, top, right, bottom in boxes:
        assert 0 <= left < right <= SIZE and 0 <= top < bottom <= SIZE
    for index, a in enumerate(boxes):
        for b in boxes[:index]:
            assert max(b[0] - a[2], a[0] - b[2], b[1] - a[3], a[1] - b[3]) >= 2 * fluent_glyphs.MARGIN
    if plan.relation:
        assert plan.relation in relations(*boxes)  # true by GenEval's rule, too


@settings(max_examples=30, deadline=None)
@given(randoms)
def test_a_thing_is_drawn_in_its_box_with_its_shadow_around(rng):
    plan, image, (box,) = drawn("colour", rng)
    left, top, right, bottom = box
    ground = fluent_scenes.ground(plan.background, rng, SIZE).mean((0, 1))
    inside = image[top:bottom, left:right].astype(float)
    assert np.abs(inside - ground).sum(-1).max() > fluent_scenes.MIN_CONTRAST
    rows, columns = np.ogrid[:SIZE, :SIZE]
    far = (rows < top - 10) | (rows > bottom + 12) | (columns < left - 10) | (columns > right + 12)
    if far.any():  # the largest things leave no place that is far
        assert np.ptp(image[far].astype(int), axis=0).max() <= 60  # nothing but the light gradient


@settings(max_examples=40, deadline=None)
@given(randoms, kinds)
def test_the_same_random_numbers_give_the_same_scene(rng, kind):
    twin = Random()
    twin.setstate(rng.getstate())
    (plan, image, boxes), (again, same, there) = drawn(kind, rng), drawn(kind, twin)
    assert (plan, boxes) == (again, there) and np.array_equal(image, same)


@pytest.mark.parametrize("colour", list(fluent_language.OBJECT_COLOURS))
def test_a_coloured_thing_is_nearest_to_its_own_colour(colour):
    own = glyphs.sprite("apple", colour, 88).own
    distances = {name: np.linalg.norm(own - value) for name, value in fluent_language.OBJECT_COLOURS.items()}
    assert min(distances, key=distances.get) == colour


@pytest.mark.parametrize("place", list(fluent_language.PLACES))
def test_a_place_has_a_sky_and_a_floor(place):
    image = fluent_scenes.ground(place, Random(0), SIZE)
    assert np.abs(image[70].mean(0) - image[90].mean(0)).max() > 15
    assert image.min() >= 0 and image.max() <= 255


def make(out, *options):
    arguments = [str(out), "--count", "40", "--size", "64", "--glyphs", str(GLYPHS), "--workers", "1", *options]
    result = CliRunner().invoke(fluent_scenes.main, arguments)
    assert result.exit_code == 0, result.output
    return [json.loads(line) for line in (out / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]


def test_an_image_folder_of_the_wanted_size(tmp_path):
    lines = make(tmp_path)
    assert len({line["file_name"] for line in lines}) == 40
    for line in lines:
        with Image.open(tmp_path / line["file_name"]) as image:
            assert (image.size, image.mode) == ((64, 64), "RGB")
        assert line["text"] and all(0 <= edge <= 64 for thing in line["scene"]["objects"] for edge in thing["box"])


def test_scenes_depend_on_the_seed_and_not_on_the_form_of_the_source(tmp_path):
    archive = tmp_path / "glyphs.tgz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(GLYPHS, "package/assets")
    first = make(tmp_path / "a", "--seed", "1")
    assert first == make(tmp_path / "b", "--seed", "1", "--glyphs", str(archive))
    assert first != make(tmp_path / "c", "--seed", "2")
    name = first[0]["file_name"]
    assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.parametrize(("text", "expected"), [(None, "found nothing"), ("no archive", "no .tgz archive")])
def test_no_usable_source_is_one_clear_line(tmp_path, text, expected):
    source = tmp_path / "emoji.tgz"
    if text is not None:
        source.write_text(text)
    result = CliRunner().invoke(fluent_scenes.main, [str(tmp_path / "out"), "--count", "1", "--glyphs", str(source)])
    assert result.exit_code == 1 and result.output.count("\n") == 1
    assert expected in result.output and not (tmp_path / "out" / "metadata.jsonl").exists()


def test_without_npm_the_message_says_how_to_name_the_source(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingDependencyError, match=r"npm pack @lobehub/fluent-emoji-3d.*--glyphs"):
        fluent_glyphs.fetch_glyphs(tmp_path)


def test_an_archive_that_was_fetched_is_used_again(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / fluent_glyphs.ARCHIVE).write_bytes(b"")
    assert fluent_glyphs.fetch_glyphs(tmp_path) == tmp_path / fluent_glyphs.ARCHIVE
