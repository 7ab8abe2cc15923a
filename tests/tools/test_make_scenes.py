from __future__ import annotations

import json
from random import Random

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from latentdiff.evaluation.prompts import EvaluationPrompt, read_prompts
from latentdiff.evaluation.rules import relations
from tests.scenes import drawn, font, make_scenes, scene_language

randoms = st.integers(0, 2**32).map(Random)
kinds = st.sampled_from(list(scene_language.KINDS))


def distance(a, b):
    """Free pixels between two boxes on the axis where they are further apart."""
    return max(b[0] - a[2], a[0] - b[2], b[1] - a[3], a[1] - b[3])


@settings(max_examples=60)
@given(randoms, kinds, st.sampled_from(["train", "test"]))
def test_objects_are_inside_apart_and_related(rng, kind, split):
    plan, image, boxes = drawn(split, kind, rng)
    assert image.size == (96, 96) and len(boxes) == len(plan.things)
    for left, top, right, bottom in boxes:
        assert 0 < left < right < 96 and 0 < top < bottom < 96
    assert all(distance(a, b) >= 2 * make_scenes.MARGIN for index, a in enumerate(boxes) for b in boxes[:index])
    if plan.relation:
        assert plan.relation in relations(*boxes)  # true by GenEval's rule, too


@settings(max_examples=30)
@given(randoms, kinds)
def test_boxes_hold_all_that_is_not_background(rng, kind):
    _, image, boxes = drawn("train", kind, rng)
    for box in boxes:
        assert len(image.crop(box).getcolors(96 * 96)) > 1  # something is there
        image.paste(image.getpixel((0, 0)), box)
    assert len(image.getcolors(96 * 96)) == 1


@settings(max_examples=40)
@given(randoms, kinds)
def test_the_same_random_numbers_give_the_same_scene(rng, kind):
    twin = Random()
    twin.setstate(rng.getstate())
    (plan, image, boxes), (again, same, there) = drawn("test", kind, rng), drawn("test", kind, twin)
    assert (plan, boxes, image.tobytes()) == (again, there, same.tobytes())


def make(out, *options):
    font()
    result = CliRunner().invoke(make_scenes.main, [str(out), "--count", "60", "--size", "64", *options])
    assert result.exit_code == 0, result.output
    return [json.loads(line) for line in (out / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]


def test_scenes_do_not_depend_on_the_workers(tmp_path):
    alone, shared = make(tmp_path / "a", "--workers", "1"), make(tmp_path / "b", "--workers", "3")
    assert alone == shared
    for line in alone:
        name = line["file_name"]
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_scenes_depend_on_the_seed(tmp_path):
    assert make(tmp_path / "a", "--seed", "1") != make(tmp_path / "b", "--seed", "2")


def test_an_image_folder_of_the_wanted_size(tmp_path):
    lines = make(tmp_path)
    assert len({line["file_name"] for line in lines}) == 60
    for line in lines:
        with Image.open(tmp_path / line["file_name"]) as image:
            assert (image.size, image.mode) == ((64, 64), "RGB")
        assert line["text"] and all(0 <= edge <= 64 for thing in line["scene"]["objects"] for edge in thing["box"])


@pytest.mark.parametrize("text", [None, "this is no font"])
def test_no_usable_font_is_one_clear_line(tmp_path, monkeypatch, text):
    monkeypatch.setattr(make_scenes, "FONT_FOLDERS", (str(tmp_path / "fonts"),))
    options = [str(tmp_path / "out"), "--count", "1", "--workers", "1"]
    if text is not None:
        (tmp_path / "font.ttf").write_text(text)
        options += ["--font", str(tmp_path / "font.ttf")]
    result = CliRunner().invoke(make_scenes.main, options)
    assert result.exit_code == 1
    assert "emoji font" in result.output and "Traceback" not in result.output
    assert not (tmp_path / "out" / "metadata.jsonl").exists()


def test_the_tool_makes_the_prompts_that_are_shipped(tmp_path):
    lines = make_scenes.evaluation_prompts(2, 0, font())
    assert [EvaluationPrompt.from_json(line) for line in lines] == [
        EvaluationPrompt.from_json(prompt.to_json()) for prompt in read_prompts(limit=2)
    ]
