"""Prompts on the command line: their account, LoRAs by name, and files with options on each line."""

from __future__ import annotations

import numpy as np
import pytest

from latentdiff.adapters.lora.saving import save_lora
from latentdiff.image import open_image
from latentdiff.recipe import read_recipe
from tests import peers
from tests.adapters.lora.conftest import make


def pixels(path) -> np.ndarray:
    return np.asarray(open_image(path)).astype(int)


@pytest.fixture
def folder(workplace):
    (workplace / "loras").mkdir()
    save_lora(make(peers.ours("sd1")), workplace / "loras/ink v2.safetensors")
    return workplace


@pytest.fixture
def generate(command, sd1, folder):
    return lambda *more: command("generate", "--model", sd1, "--steps", 2, "--seed", 3, *more)


def test_explain_makes_nothing(generate, folder):
    done = generate("a (cat:1.5)", "[cat|dog]", "--negative", "red AND blue", "--explain")
    assert done.code == 0 and not (folder / "images").exists()
    assert "2 tokens in 1 chunk of 75" in done.out and "   1.5  cat" in done.out
    assert "steps 1 to 1: " in done.out and "negative: 'red AND blue'" in done.out
    assert "has no meaning in the syntax a1111: 'AND'" in done.out


def test_loras_by_name(command, generate, sd1):
    assert generate("cat", "--lora", "loras/ink v2.safetensors:0.5", "--out", "file.png").code == 0
    assert generate("cat<lora:ink v2:0.5>", "--lora-dir", "loras", "--out", "tag.png").code == 0
    assert generate("cat", "--out", "none.png").code == 0
    assert np.array_equal(pixels("file.png"), pixels("tag.png"))
    assert not np.array_equal(pixels("none.png"), pixels("tag.png"))
    (entry,) = read_recipe(open_image("tag.png").info).loras
    assert (entry["file"], entry["scale"], entry["tag"]) == ("ink v2.safetensors", 0.5, "ink v2")
    again = command("reproduce", "tag.png", "--model", sd1, "--lora-dir", "loras")
    assert again.out.splitlines()[-1].startswith("identical")


def test_names_that_are_not_there(generate):
    done = generate("cat <lora:ink v3:1>", "--lora-dir", "loras")
    assert done.code == 2 and done.errors == [
        "error: there is no LoRA called 'ink v3', which the prompt names; did you mean 'ink v2'?"
    ]
    done = generate("cat", "--lora-dir", "nothing")
    assert done.code == 2 and done.errors == ["error: there is no folder nothing of LoRAs"]


def test_options_on_each_line(generate, folder):
    (folder / "p.txt").write_text('a cat --d 9 --s 3 --n red\n--prompt "dog" --cfg_scale 2 --n_iter 2\nfox\n')
    done = generate("--prompts", "p.txt", "--out", "out")
    assert done.code == 0
    found = [read_recipe(open_image(path).info) for path in done.out.split()]
    assert [(r.prompt, r.seed, r.steps, r.guidance_scale, r.negative_prompt) for r in found] == [
        ("a cat", 9, 3, 5.0, "red"),
        ("dog", 3, 2, 2.0, ""),
        ("dog", 4, 2, 2.0, ""),
        ("fox", 3, 2, 5.0, ""),
    ]
    assert generate("--prompts", "p.txt", "--out", "out", "--skip-existing").out == ""


def test_wildcards_only_where_asked_for(generate, folder):
    (folder / "w").mkdir()
    (folder / "w/thing.txt").write_text("cat\ndog\nfox\n")
    done = generate("a __thing__", "-n", 4, "--wildcards", "w")
    prompts = [read_recipe(open_image(path).info).prompt for path in done.out.split()]
    assert len(prompts) == 4 and set(prompts) <= {"a cat", "a dog", "a fox"} and len(set(prompts)) > 1
