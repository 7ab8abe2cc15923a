"""What makes images quicker, from the command line: the preset, the cache, and previews while at work."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from latentdiff.cli.generate import generate as generate_command
from latentdiff.image import open_image
from latentdiff.networks.tiny_vae import TinyDecoder
from latentdiff.recipe import read_recipe
from latentdiff.request.options import FAST


@pytest.fixture
def generate(command, sd1):
    return lambda *arguments: command("generate", "cat", "--seed", 3, "--model", sd1, *arguments)


def recipe_of(path: str):
    return read_recipe(open_image(path).info)


def test_fast_takes_other_defaults_and_reproduce_needs_no_preset(generate, command, sd1):
    assert generate("--fast", "--out", "fast.png").code == 0
    recipe = recipe_of("fast.png")
    assert {name: getattr(recipe, name) for name in FAST} == FAST
    done = command("reproduce", "fast.png", "--model", sd1)
    assert (done.code, done.out) == (0, "identical: every pixel is the same\n")


def test_what_is_given_wins_over_the_preset(generate):
    assert generate("--fast", "--steps", 2, "--sampler", "euler", "--out", "fast.png").code == 0
    recipe = recipe_of("fast.png")
    assert (recipe.steps, recipe.sampler, recipe.spacing) == (2, "euler", FAST["spacing"])


def test_a_fast_image_that_is_there_is_found_again(generate):
    options = ("--fast", "--steps", 2, "--out", "images", "--skip-existing")
    assert generate(*options).code == 0
    assert "is there already" in generate(*options).err
    other = generate("--steps", 2, "--out", "images", "--skip-existing")
    assert "is there already" not in other.err


def test_a_cached_image_is_reproduced(generate, command, sd1):
    options = ("--steps", 4, "--cache-interval", 2, "--cache-branch", 1, "--cache-centre", 1)
    assert generate(*options, "--out", "cached.png").code == 0
    recipe = recipe_of("cached.png")
    assert (recipe.cache_interval, recipe.cache_branch, recipe.cache_centre) == (2, 1, 1)
    assert command("reproduce", "cached.png", "--model", sd1).out == "identical: every pixel is the same\n"
    assert generate("--steps", 4, "--out", "plain.png").code == 0
    assert not np.array_equal(open_image("cached.png"), open_image("plain.png"))


@pytest.mark.parametrize("spacing", ["karras", "uniform-lambda", "ays"])
def test_spacings_of_noise_are_reproduced(generate, command, sd1, spacing):
    assert generate("--steps", 3, "--sampler", "unipc", "--spacing", spacing, "--out", "a.png").code == 0
    assert (recipe_of("a.png").sampler, recipe_of("a.png").spacing) == ("unipc", spacing)
    assert command("reproduce", "a.png", "--model", sd1).out == "identical: every pixel is the same\n"


def test_a_branch_that_the_model_does_not_have_is_refused(generate):
    done = generate("--steps", 2, "--cache-interval", 2, "--cache-branch", 99, "--out", "a.png")
    assert done.code == 2 and "expected a cache branch of 0 to" in done.err


@pytest.mark.parametrize("tiny", [False, True])
def test_a_preview_is_written_and_changes_nothing(generate, tmp_path, tiny):
    options = ()
    if tiny:
        torch.manual_seed(0)
        state = {f"decoder.{name}": tensor for name, tensor in TinyDecoder().state_dict().items()}
        save_file(state, tmp_path / "tiny.safetensors")
        options = ("--preview-decoder", tmp_path / "tiny.safetensors")
    assert generate("--steps", 2, "--out", "plain.png").code == 0
    assert (
        generate("--steps", 2, "--out", "watched.png", "--preview", "now.png", "--preview-every", 1, *options).code == 0
    )
    assert open_image("plain.png").tobytes() == open_image("watched.png").tobytes()
    assert open_image("now.png").width % 64 == 0


def test_a_decoder_without_previews_is_refused(generate):
    done = generate("--preview-decoder", "tiny.safetensors")
    assert done.code == 2 and "expected --preview FILE with" in done.err


def test_help_says_what_fast_takes():
    (line,) = (option.help for option in generate_command.params if option.name == "fast")
    assert all(str(value) in line for value in FAST.values())
