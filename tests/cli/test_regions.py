from __future__ import annotations

import pytest

from latentdiff.cli.regions import parse_region
from latentdiff.errors import DataError, UsageError
from latentdiff.image import open_image
from latentdiff.recipe import read_recipe
from tests.tasks.images import apart, mask


def test_generate_and_reproduce(command, sd1, workplace):
    mask((0, 0, 32, 64)).save("mask.png")
    options = ["--model", sd1, "--steps", 2, "--seed", 1]
    regions = ["--region", "top right:0.9=a dog", "--region", "mask.png=a red fox", "--region", "0,0.5,1,1=two cat"]
    done = command("generate", "cat", *options, *regions, "--out", "a.png")
    assert done.code == 0, done.err
    recorded = read_recipe(open_image("a.png").info).regions
    assert [(one.prompt, one.box, one.weight) for one in recorded] == [
        ("a dog", [0.5, 0.0, 1.0, 0.5], 0.9), ("a red fox", None, 0.7), ("two cat", [0.0, 0.5, 1.0, 1.0], 0.7),
    ]  # fmt: skip
    done = command("reproduce", "a.png", "--model", sd1)
    assert done.out == "identical: every pixel is the same\n", done.err
    command("generate", "cat", *options, "--out", "plain.png")
    assert apart(open_image("a.png"), open_image("plain.png")) > 2
    for text, message in {"left": "PLACE[:WEIGHT]=PROMPT", "0.5,0,2,1=a": "within the image", "up=a": "found 'up'"}.items():
        done = command("generate", "cat", *options, "--region", text)
        assert done.code and len(done.errors) == 1 and message in done.errors[0]


def test_how_regions_are_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    mask((0, 0, 4, 4)).save("left", format="PNG")
    assert parse_region("center=a=b") == ("a=b", {"box": "center"})
    assert parse_region("0, .5,1,1:.25= a cat") == ("a cat", {"box": ["0", " .5", "1", "1"], "weight": 0.25})
    assert parse_region("left:2=a") == ("a", {"mask": "left", "weight": 2.0})
    with pytest.raises(UsageError, match="PLACE"):
        parse_region("=a")
    with pytest.raises(DataError, match=r"no image at top\.png"):
        parse_region("top.png=a")
