"""Prompt files with options on each line, and drawn prompts."""

from __future__ import annotations

import pytest

from latentdiff.errors import UsageError
from latentdiff.prompts.lines import Line, read_lines
from latentdiff.prompts.wildcards import Wildcards
from latentdiff.request.infotext import SAMPLER_TITLES
from latentdiff.request.options import OPTIONS, checked


@pytest.mark.parametrize(
    ("text", "prompt", "options"),
    [
        ("a cat", "a cat", {}),
        ("a cat -- and a dog - 3", "a cat -- and a dog - 3", {}),
        (
            "a cat --n bad, blurry --w 512 --h 768 --d 7 --s 30 --l 7.5",
            "a cat",
            {
                "negative_prompt": "bad, blurry",
                "width": 512,
                "height": 768,
                "seed": 7,
                "steps": 30,
                "guidance_scale": 7.5,
            },
        ),
        ("a cat --n", "a cat", {"negative_prompt": ""}),
        ("a cat --d 1 --d 2", "a cat", {"seed": 2}),
        (
            '--prompt "a \\"big\\" cat" --negative_prompt "bad" --steps 30 --cfg_scale 7 --seed 7 --sampler_name "ddim"',
            'a "big" cat',
            {"negative_prompt": "bad", "steps": 30, "guidance_scale": 7.0, "seed": 7, "sampler": "ddim"},
        ),
        ('--prompt "a" --sampler_name "DPM++ 2M" --n_iter 3', "a", {"sampler": "dpmpp-2m", "num_images": 3}),
    ],
)
def test_lines(text, prompt, options):
    (line,) = read_lines(["# a comment\n", "\n", text + "\n"], SAMPLER_TITLES)
    assert line == Line(prompt, tuple(options.items()))
    assert checked(dict(line.options)) == options and options.keys() <= OPTIONS.keys()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a cat --ar 16:9", "line 1 of the prompts, 'a cat --ar 16:9': there is no option --ar here; known are --n"),
        ("a cat --w wide", "expected a number for --w, found 'wide'"),
        ('--prompt "a', "No closing quotation"),
        ("--prompt a cat", "expected pairs of --option"),
        ("--steps 30", "expected --prompt"),
        ("--prompt a --outpath_grids x", "no option --outpath_grids"),
    ],
)
def test_lines_that_are_none(text, message):
    with pytest.raises(UsageError) as caught:
        read_lines([text], {})
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.fixture
def wildcards(tmp_path):
    (tmp_path / "colour.txt").write_text("red\nblue\ngreen\n")
    return Wildcards(tmp_path)


def test_a_seed_draws_the_same_prompt(wildcards):
    template = "a {cat|dog} on __colour__"
    drawn = {seed: wildcards.draw(template, seed) for seed in range(40)}
    assert drawn == {seed: wildcards.draw(template, seed) for seed in range(40)}
    assert set(drawn.values()) == {
        f"a {thing} on {colour}" for thing in ("cat", "dog") for colour in ("red", "blue", "green")
    }


def test_the_grammar_of_prompts_is_left_alone(wildcards):
    prompt = "(a:1.2) [x:y:0.5] [a|b] BREAK \\(b\\) <lora:x:1>"
    assert wildcards.draw(prompt, 1) == prompt


def test_wildcards_that_are_not_there(wildcards, tmp_path):
    with pytest.raises(UsageError, match="there is no wildcard __animal__ in the folder"):
        wildcards.draw("an __animal__", 1)
    with pytest.raises(UsageError, match="expected a template"):
        wildcards.draw("a {cat|", 1)
    with pytest.raises(UsageError, match="there is no folder"):
        Wildcards(tmp_path / "nothing")
