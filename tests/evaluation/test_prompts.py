from __future__ import annotations

import json
from collections import Counter

import pytest

from latentdiff.errors import DataError
from latentdiff.evaluation.prompts import TASKS, EvaluationPrompt, Requirement, prompt_of_scene, read_prompts

LINE = {
    "tag": "position",
    "include": [{"class": "key", "count": 1}, {"class": "fox", "count": 1, "position": ["left of", 0]}],
    "background": "pink",
    "prompt": "a photo of a fox to the left of a key on a pink background",
}


def test_shipped_prompts():
    prompts = read_prompts()
    assert Counter(prompt.task for prompt in prompts) == dict.fromkeys(TASKS, 50)
    assert len({prompt.text for prompt in prompts}) == len(prompts)
    assert [prompt.number for prompt in prompts] == list(range(len(prompts)))


def test_a_limit_keeps_the_first_of_each_task_with_their_numbers():
    prompts = read_prompts(limit=2)
    assert Counter(prompt.task for prompt in prompts) == dict.fromkeys(TASKS, 2)
    assert all(prompt in read_prompts() for prompt in prompts)


def test_json_there_and_back():
    for prompt in read_prompts():
        assert EvaluationPrompt.from_json(prompt.to_json(), prompt.number) == prompt
    assert EvaluationPrompt.from_json(LINE).to_json() == LINE


@pytest.mark.parametrize(
    "line", ["", "[]", "{}", '{"tag": "position"}', json.dumps(LINE | {"tag": "taste"}), "\N{SNOWMAN}"]
)
def test_a_line_that_is_no_prompt(tmp_path, line):
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps(LINE) + "\n" + line + "\n", encoding="utf-8")
    with pytest.raises(DataError, match="prompts.jsonl line 2: expected a prompt"):
        read_prompts(path)


def scene(kind, *things, relation=None):
    objects = [{"noun": noun, "colour": colour, "box": [0, 0, 9, 9]} for noun, colour in things]
    return {"kind": kind, "background": "red", "relation": relation, "objects": objects}


def test_prompt_of_a_counting_scene_forbids_one_more():
    prompt = prompt_of_scene(scene("counting", *[("cat", None)] * 3), "three cats")
    assert prompt == EvaluationPrompt("counting", "three cats", (Requirement("cat", 3),), (("cat", 4),), "red")


def test_prompt_of_a_position_scene_relates_the_first_to_the_second():
    prompt = prompt_of_scene(scene("position", ("cat", None), ("dog", None), relation="above"), "a cat above a dog")
    assert prompt.include == (Requirement("dog"), Requirement("cat", position=("above", 0)))


def test_prompt_of_an_attribution_scene():
    prompt = prompt_of_scene(scene("attribution", ("cat", "red"), ("dog", "blue")), "")
    assert prompt.task == "color_attr" and prompt.include == (
        Requirement("cat", 1, "red"),
        Requirement("dog", 1, "blue"),
    )
