from __future__ import annotations

import json

import numpy as np
import pytest

from latentdiff import Pipeline
from latentdiff.errors import UsageError
from latentdiff.evaluation.judge import Seen, Verdict
from latentdiff.evaluation.prompts import TASKS, EvaluationPrompt, Requirement, read_prompts
from latentdiff.training.data import read_dataset
from tests.scenes import scene_language

import make_pairs  # noqa: E402, isort: skip

PROMPT = EvaluationPrompt("single_object", "a cat", (Requirement("cat"),), background="red")


def seen(noun, background="red"):
    return Verdict((Seen(noun, None, (0.1, 0.1, 0.9, 0.9), 0.9),), background)


def test_the_first_right_image_goes_with_the_first_wrong_one():
    verdicts = [seen("dog"), seen("cat"), seen("cat", "blue"), seen("cat"), seen("cat"), seen("dog")]
    names = [f"{number}.png" for number in range(6)]
    rows = list(make_pairs.pairs_of(PROMPT, names, verdicts, most=9))
    assert [(row["preferred"], row["rejected"]) for row in rows] == [("1.png", "0.png"), ("3.png", "2.png"), ("4.png", "5.png")]
    assert {row["text"] for row in rows} == {"a cat"}
    assert (rows[0]["why"], rows[1]["why"]) == ("expected 1 cat, saw 0", "expected the background red")
    assert len(list(make_pairs.pairs_of(PROMPT, names, verdicts, most=1))) == 1
    assert not list(make_pairs.pairs_of(PROMPT, names[:2], [seen("dog")] * 2, most=9))  # none is right
    assert not list(make_pairs.pairs_of(PROMPT, names[:2], [seen("cat")] * 2, most=9))  # none is wrong


def test_nothing_that_is_evaluated_is_asked_for():
    prompts = list(make_pairs.training_prompts(60, 0))
    assert {prompt.task for prompt in prompts} == set(TASKS) and [prompt.number for prompt in prompts] == list(range(60))
    assert not {prompt.text for prompt in prompts} & {prompt.text for prompt in read_prompts()}
    for prompt in prompts:
        for need in prompt.include:
            assert not scene_language.held_out("background", need.noun, prompt.background)


def test_own_prompts_may_be_of_one_task_alone():
    assert {prompt.task for prompt in make_pairs.training_prompts(8, 0, ["color_attr"])} == {"color_attr"}


def test_pairs_are_drawn_judged_and_read_again(tmp_path, monkeypatch):
    """The tool as it is, with a judge whose word alternates."""
    monkeypatch.setattr(
        make_pairs.Judge, "__call__", lambda self, images: [seen(("cat", "dog")[n % 2]) for n in range(len(images))]
    )
    pipe = Pipeline.load()
    options = {"steps": 1, "guidance_scale": 1.0, "sampler": "ddim"}
    made = make_pairs.make_pairs(tmp_path, [PROMPT], pipe, seeds=4, most=2, options=options)
    assert made == (2, 1)
    data = read_dataset([tmp_path], pairs=True)
    assert data.names == ("00000-00.png > 00000-01.png", "00000-02.png > 00000-03.png")
    assert data.captions == (("a cat",),) * 2
    whole = pipe("a cat", seed=2, steps=1, guidance_scale=1.0, sampler="ddim", progress=False)[0]
    apart = np.asarray(data.load(1), dtype=int) - np.asarray(whole)
    assert abs(apart).max() <= 1  # a batch rounds otherwise than one image
    before = (tmp_path / "00000-01.png").read_bytes()
    (tmp_path / "00000-00.png").unlink()
    make_pairs.make_pairs(tmp_path, [PROMPT], asked_for_one(pipe), seeds=4, most=2, options=options)
    assert (tmp_path / "00000-00.png").is_file() and (tmp_path / "00000-01.png").read_bytes() == before
    with pytest.raises(UsageError, match="drawn with steps 1, now it is 2"):
        make_pairs.make_pairs(tmp_path, [PROMPT], pipe, seeds=4, most=2, options={**options, "steps": 2})
    assert json.loads((tmp_path / "metadata.jsonl").read_text().splitlines()[0])["task"] == "single_object"


def asked_for_one(pipe):
    """A pipeline that must be asked for a single image."""

    class OfOne:
        model_hash = pipe.model_hash

        def __call__(self, prompts, **options):
            assert len(prompts) == 1 and options["seed"] == [0]
            return pipe(prompts, **options)

    return OfOne()
