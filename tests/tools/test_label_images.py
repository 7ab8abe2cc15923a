"""Images for people to label, and the judge measured by their labels."""

from __future__ import annotations

import json
from collections import Counter
from random import Random

import pytest
from click.testing import CliRunner
from PIL import Image

from latentdiff.errors import DataError, UsageError
from latentdiff.evaluation.agreement import read_agreement
from latentdiff.evaluation.judge import Judge, Seen, Verdict, save_judge
from latentdiff.evaluation.network import JudgeConfig
from latentdiff.evaluation.prompts import TASKS, EvaluationPrompt, read_prompts
from latentdiff.pipeline import Pipeline
from tests import peers
from tests.scenes import asked_and_shown

import label_images  # isort: skip  (found by tests.scenes)

SETTINGS = {"steps": 1, "guidance_scale": 1.0, "model_hash": "abc"}


def run(*arguments):
    return CliRunner().invoke(label_images.main, [str(argument) for argument in arguments], catch_exceptions=False)


def test_prompts_of_all_tasks_in_turn():
    lines = label_images.new_lines(read_prompts(), 13, SETTINGS)
    assert [line["tag"] for line in lines] == [*TASKS, *TASKS, "single_object"]
    assert len({line["seed"] for line in lines}) == 13 and all(line["label"] is None for line in lines)
    assert EvaluationPrompt.from_json(lines[1]) == next(
        EvaluationPrompt.from_json(prompt.to_json()) for prompt in read_prompts() if prompt.task == "two_object"
    )
    with pytest.raises(UsageError, match="at most 300"):
        label_images.new_lines(read_prompts(), 301, SETTINGS)


def test_drawn_labelled_and_drawn_again_from_the_labels_alone(tmp_path):
    model = str(peers.folder("sd1"))
    run("draw", tmp_path / "a", "--model", model, "--count", 3, "--steps", 1)
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [
        "0000.png", "0001.png", "0002.png", "labels.jsonl", "sheet-00.png",
    ]  # fmt: skip
    run("label", tmp_path / "a", "--sheet", 0, "--wrong", "1")
    lines = label_images.read_lines(tmp_path / "a")
    assert [line["label"] for line in lines] == ["right", "wrong", "right"]

    label_images.write_lines(tmp_path / "b", lines)
    run("draw", tmp_path / "b", "--model", model)
    assert label_images.read_lines(tmp_path / "b") == lines
    assert (tmp_path / "a" / "0001.png").read_bytes() == (tmp_path / "b" / "0001.png").read_bytes()
    with pytest.raises(DataError, match="expected labels of the model .*, found some of abc"):
        label_images.draw_missing(Pipeline.load(model), tmp_path, [lines[0] | SETTINGS])


@pytest.mark.parametrize("wrong", ["20", "-1", "1,2", "x"])
def test_numbers_that_are_not_on_the_sheet(tmp_path, wrong):
    label_images.write_lines(tmp_path, label_images.new_lines(read_prompts(), 25, SETTINGS))
    with pytest.raises(UsageError, match="expected --wrong of sheet 0 to be numbers from 0 to 19"):
        run("label", tmp_path, "--sheet", 0, "--wrong", wrong)
    assert not any(line["label"] for line in label_images.read_lines(tmp_path))


def test_labels_that_are_none(tmp_path):
    with pytest.raises(DataError, match="found nothing; `label_images.py draw` makes it"):
        label_images.read_lines(tmp_path)
    label_images.write_lines(tmp_path, [{"seed": 1, "label": "maybe"} | SETTINGS])
    with pytest.raises(DataError, match='line 1: expected "label" as "right", "wrong" or null'):
        label_images.read_lines(tmp_path)


class Certain:
    """A judge that is as certain of a cat as the image is bright."""

    network, config = None, JudgeConfig(("cat",), (), ("red",))

    def __init__(self, network=None):
        pass

    def __call__(self, images):
        return [
            Verdict((Seen("cat", None, (0.0, 0.0, 1.0, 1.0), image.getpixel((0, 0))[0] / 255),), "red")
            for image in images
        ]


def test_both_halves_hold_every_task():
    prompts = [EvaluationPrompt.from_json(line) for line in label_images.new_lines(read_prompts(), 24, SETTINGS)]
    halves = label_images.halves(prompts)
    assert sorted(halves[0] + halves[1]) == list(range(24))
    assert all(Counter(prompts[place].task for place in half) == dict.fromkeys(TASKS, 2) for half in halves)


def test_threshold_on_one_half_and_agreement_on_the_other(monkeypatch):
    monkeypatch.setattr(label_images, "Judge", Certain)
    asked = EvaluationPrompt.from_json(
        {"tag": "single_object", "include": [{"class": "cat", "count": 1}], "prompt": "a cat"}
    )
    shades = [
        20,
        20,
        230,
        230,
        30,
        240,
        220,
        40,
        25,
        25,
    ]  # the odd places hold three images that are not as bright as good
    labels = ["wrong", "wrong", "right", "right", "wrong", "wrong", "right", "right", "wrong", "wrong"]
    lines = [asked.to_json() | {"label": label} for label in labels]
    images = [Image.new("RGB", (8, 8), (shade, 0, 0)) for shade in shades]
    threshold, agreement = label_images.compared(Certain(), [*lines, {"label": None}], [*images, images[0]])
    assert threshold == pytest.approx(0.49, abs=0.02)
    assert agreement == label_images.Agreement(right_by_both=1, wrong_by_both=2, false_right=1, false_wrong=1)
    with pytest.raises(DataError, match="expected labels, found 0 of 1"):
        label_images.compared(Certain(), [{"label": None}], images)


def test_what_is_found_lies_beside_the_judge(tmp_path):
    folder, judge_folder, rng = tmp_path / "labelled", tmp_path / "judge", Random(3)
    judge = Judge.load(label_images.embedded_judge())
    save_judge(judge.network, judge_folder)
    lines = []
    for place in range(4):
        prompt, image = asked_and_shown("single", rng)
        folder.mkdir(exist_ok=True)
        image.save(label_images.image_path(folder, place))
        lines.append(prompt.to_json() | {"seed": place, "label": "right"} | SETTINGS)
    label_images.write_lines(folder, lines)
    before = json.loads((judge_folder / "config.json").read_text())
    told = run("agree", folder, "--judge", judge_folder)
    assert read_agreement(judge_folder) is None and "the judge agrees with people on" in told.output
    run("agree", folder, "--judge", judge_folder, "--write")
    assert read_agreement(judge_folder).images == 2
    after = json.loads((judge_folder / "config.json").read_text())
    assert {**after, "threshold": None} == {**before, "threshold": None}
    assert Judge.load(judge_folder).config.nouns == judge.config.nouns
    assert label_images.read_lines(judge_folder) == lines
