from __future__ import annotations

import json
import tarfile
from random import Random

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from latentdiff.errors import DataError, MissingDependencyError
from latentdiff.evaluation.prompts import TASKS, EvaluationPrompt, read_prompts
from latentdiff.evaluation.rules import relations
from tests.scenes import FEW, GLYPHS, SIZE, drawn, glyphs, make_scenes, scene_folder, scene_language

randoms = st.integers(0, 2**32).map(Random)
kinds = st.sampled_from(list(scene_language.KINDS))


@settings(max_examples=60, deadline=None)
@given(randoms, kinds, st.sampled_from(["train", "test"]))
def test_things_are_inside_apart_and_related(rng, kind, split):
    plan, image, boxes = drawn(split, kind, rng)
    assert image.size == (SIZE, SIZE) and len(boxes) == len(plan.things)
    for left, top, right, bottom in boxes:
        assert 0 <= left < right <= SIZE and 0 <= top < bottom <= SIZE
    for index, a in enumerate(boxes):
        for b in boxes[:index]:
            assert max(b[0] - a[2], a[0] - b[2], b[1] - a[3], a[1] - b[3]) >= 2 * glyphs.MARGIN
    if plan.relation:
        assert plan.relation in relations(*boxes)  # true by GenEval's rule, too


@settings(max_examples=30, deadline=None)
@given(randoms)
def test_a_thing_is_drawn_in_its_box_with_its_shadow_around(rng):
    plan, image, (box,) = drawn("train", "colour", rng)
    pixels = np.asarray(image)
    left, top, right, bottom = box
    ground = make_scenes.ground(plan.background, rng, SIZE).mean((0, 1))
    inside = pixels[top:bottom, left:right].astype(float)
    assert np.abs(inside - ground).sum(-1).max() > make_scenes.MIN_CONTRAST
    rows, columns = np.ogrid[:SIZE, :SIZE]
    far = (rows < top - 10) | (rows > bottom + 12) | (columns < left - 10) | (columns > right + 12)
    if far.any():  # the largest things leave no place that is far
        assert np.ptp(pixels[far].astype(int), axis=0).max() <= 60  # nothing but the light gradient


@settings(max_examples=40, deadline=None)
@given(randoms, kinds)
def test_the_same_random_numbers_give_the_same_scene(rng, kind):
    twin = Random()
    twin.setstate(rng.getstate())
    (plan, image, boxes), (again, same, there) = drawn("test", kind, rng), drawn("test", kind, twin)
    assert (plan, boxes, image.tobytes()) == (again, there, same.tobytes())


@pytest.mark.parametrize("kind", list(scene_language.KINDS))
def test_what_a_sentence_leaves_open_is_arranged_the_same(kind):
    """Two plans that differ in the things alone stand in the same cells, but for the shift."""
    found = {}
    for seed in range(60):
        plan, _, boxes = drawn("train", kind, Random(seed))
        centres = np.array([((a + c) / 2, (b + d) / 2) for a, b, c, d in boxes])
        alike = (len(boxes), plan.relation, plan.background in scene_language.PLACES, plan.things[0].size)
        found.setdefault(alike, []).append(centres)
    for many in found.values():
        assert (np.ptp(many, axis=0) <= make_scenes.GRID + 2).all()


def test_things_stand_in_the_order_in_which_they_are_named():
    for seed in range(20):
        plan, _, (first, second) = drawn("train", "two", Random(seed))
        text = scene_language.caption(plan, Random(seed))
        names = [text.find(thing.noun) for thing in plan.things]
        assert first[0] < second[0] and names[0] < names[1], text


def test_scenes_of_some_things_alone(tmp_path):
    lines = make(tmp_path, "--nouns", "cat, dog,owl,fish")
    assert {thing["noun"] for line in lines for thing in line["scene"]["objects"]} <= {"cat", "dog", "owl", "fish"}


@pytest.mark.parametrize(("nouns", "expected"), [("cat,dog,chimera", "found 'chimera'"), ("cat,dog", "at least 3 things")])
def test_nouns_that_make_no_scenes_are_refused(tmp_path, nouns, expected):
    arguments = [str(tmp_path / "out"), "--count", "1", "--nouns", nouns, "--glyphs", str(GLYPHS)]
    result = CliRunner().invoke(make_scenes.main, arguments)
    assert result.exit_code == 1 and expected in str(result.exception) + result.output


@pytest.mark.parametrize("colour", list(scene_language.OBJECT_COLOURS))
def test_a_coloured_thing_is_nearest_to_its_own_colour(colour):
    for noun in FEW.nouns:  # dark ones such as the hat, and light ones
        own = FEW.sprite(noun, colour, 88).own
        distances = {name: np.linalg.norm(own - value) for name, value in scene_language.OBJECT_COLOURS.items()}
        assert min(distances, key=distances.get) == colour, noun
        assert distances[colour] < 60, noun


@pytest.mark.parametrize("place", list(scene_language.PLACES))
def test_a_place_has_a_sky_and_a_floor(place):
    image = make_scenes.ground(place, Random(0), SIZE)
    assert np.abs(image[70].mean(0) - image[90].mean(0)).max() > 15
    assert image.min() >= 0 and image.max() <= 255


def make(out, *options):
    scene_folder(out, 40, "--size", "64", *options)
    return [json.loads(line) for line in (out / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]


def test_an_image_folder_of_the_wanted_size(tmp_path):
    lines = make(tmp_path)
    assert len({line["file_name"] for line in lines}) == 40
    for line in lines:
        with Image.open(tmp_path / line["file_name"]) as image:
            assert (image.size, image.mode) == ((64, 64), "RGB")
        assert line["text"] and all(0 <= edge <= 64 for thing in line["scene"]["objects"] for edge in thing["box"])


def test_scenes_depend_on_the_seed_and_on_neither_the_workers_nor_the_form_of_the_source(tmp_path):
    archive = tmp_path / "glyphs.tgz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(GLYPHS, "package/assets")
    first = make(tmp_path / "a", "--seed", "1")
    assert first == make(tmp_path / "b", "--seed", "1", "--glyphs", str(archive), "--workers", "2")
    assert first != make(tmp_path / "c", "--seed", "2")
    name = first[0]["file_name"]
    assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_layout_is_white_where_things_stand(tmp_path):
    for line in make(tmp_path, "--layouts"):
        with Image.open((tmp_path / line["file_name"]).with_suffix(".hint.png")) as image:
            hint = np.asarray(image)
        expected = np.zeros((64, 64, 3))
        for thing in line["scene"]["objects"]:
            left, top, right, bottom = thing["box"]
            expected[top:bottom, left:right] = 255
        assert np.array_equal(hint, expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [(None, "found nothing"), ("no archive", "no .tgz archive"), ("", "at least 12 nouns in .*, found 0")],
)
def test_no_usable_source_is_one_clear_line(tmp_path, text, expected):
    source = tmp_path / "emoji.tgz"
    if text:
        source.write_text(text)
    elif text is not None:
        source.mkdir()
    result = CliRunner().invoke(make_scenes.main, [str(tmp_path / "out"), "--count", "1", "--glyphs", str(source)])
    assert result.exit_code == 1 and result.output.count("\n") == 1
    with pytest.raises(DataError, match=expected):
        _ = glyphs.Glyphs(source).nouns
    assert not (tmp_path / "out" / "metadata.jsonl").exists()


def test_a_smaller_world_says_so(tmp_path):
    arguments = [str(tmp_path), "--count", "1", "--workers", "1", "--glyphs", str(GLYPHS)]
    result = CliRunner().invoke(make_scenes.main, arguments)
    assert f"{len(FEW.nouns)} of {len(scene_language.NOUNS)} nouns" in result.output and result.exit_code == 0


def test_without_npm_the_message_says_how_to_name_the_source(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingDependencyError, match=r"npm pack @lobehub/fluent-emoji-3d.*--glyphs"):
        glyphs.fetch_glyphs(tmp_path)


def test_an_archive_that_was_fetched_is_used_again(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / glyphs.ARCHIVE).write_bytes(b"")
    assert glyphs.fetch_glyphs(tmp_path) == tmp_path / glyphs.ARCHIVE


def test_prompts_of_every_task_for_the_nouns_that_are_there():
    lines = make_scenes.evaluation_prompts(3, 0, FEW)
    prompts = [EvaluationPrompt.from_json(line) for line in lines]
    assert [prompt.task for prompt in prompts] == [task for task in TASKS for _ in range(3)]
    assert {need.noun for prompt in prompts for need in prompt.include} <= set(FEW.nouns)


def plan_of(prompt: EvaluationPrompt) -> scene_language.Plan:
    """The plan that a prompt was made of."""
    things = [scene_language.Thing(need.noun, need.colour) for need in prompt.include for _ in range(need.count)]
    relation = None
    if prompt.task == "position":
        things.reverse()
        relation = prompt.include[1].position[0]
    return scene_language.Plan(make_scenes.TASKS[prompt.task], prompt.background, tuple(things), relation)


def test_the_prompts_that_are_shipped_are_of_this_world_and_held_out():
    prompts = read_prompts()
    assert len(prompts) == len({prompt.text for prompt in prompts}) == 50 * len(TASKS)
    for prompt in prompts:
        plan = plan_of(prompt)
        assert scene_language.prompt(plan) == prompt.text and scene_language.belongs_to(plan, "test")
        assert {thing.noun for thing in plan.things} <= set(scene_language.NOUNS)
