"""The task `upscale`: what is kept of images of every kind, and its recipe."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from latentdiff import Upscaler, image_to_image, upscale
from latentdiff.errors import UsageError
from latentdiff.image import open_image, save_png
from latentdiff.recipe import read_recipe
from latentdiff.tasks import TASKS
from tests import peers, upscalers
from tests.tasks.images import an_image, apart


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Path:
    return upscalers.saved(upscalers.esrgan(2), tmp_path_factory.mktemp("upscaler") / "2x.safetensors")


def test_sixteen_bits_and_palettes_are_seen_as_they_look(two):
    levels = np.tile(np.linspace(0, 255, 40).astype(np.uint8), (30, 1))
    of_eight = Image.fromarray(levels)
    expected = upscale(of_eight.convert("RGB"), two)
    deep = Image.fromarray(levels.astype(np.uint16) * 257)
    for image in (deep, of_eight.convert("P"), of_eight):
        assert np.array_equal(np.asarray(upscale(image, two)), np.asarray(expected))


def test_transparency_is_kept(two):
    image = an_image(40, 30)
    alpha = Image.new("L", (40, 30), 255)
    alpha.paste(0, (0, 0, 20, 30))
    image.putalpha(alpha)
    found = upscale(image, two)
    assert found.mode == "RGBA" and found.size == (80, 60)
    kept = np.asarray(found.getchannel("A"))
    assert (kept[:, :32] == 0).all() and (kept[:, 48:] == 255).all()
    on_white = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    opaque = kept == 255
    assert np.array_equal(np.asarray(found)[opaque][:, :3], np.asarray(upscale(on_white, two))[opaque])


def test_a_model_goes_over_it_in_windows(two, tmp_path):
    pipe = peers.ours("sd1")
    save_png(an_image(48, 40), tmp_path / "photo.png")
    walk = {"strength": 0.6, "steps": 4, "seed": 3, "progress": False}
    made = upscale(tmp_path / "photo.png", two, pipe=pipe, prompt="cat", **walk)
    large = upscale(tmp_path / "photo.png", two)
    (expected,) = image_to_image(pipe, large, "cat", window=64, vae_tile=64, **walk)
    assert made.size == (96, 80) and apart(made, expected) == 0 and apart(made, large) > 1
    save_png(made, tmp_path / "large.png")
    recipe = read_recipe(open_image(tmp_path / "large.png").info)
    assert (recipe.window, recipe.vae_tile, recipe.prompt) == (64, 64, "cat")
    again = TASKS["upscale"](pipe, recipe, {"image": tmp_path / "photo.png", "upscaler": two})
    assert apart(made, again) == 0


@pytest.mark.parametrize(
    "options, line", [({"prompt": "cat"}, "expected pipe"), ({"steps": 3}, "with steps"), ({"tile": 100}, "128 pixels")]
)
def test_bad_values(two, options, line):
    with pytest.raises(UsageError, match=line):
        upscale(an_image(8, 8), two, **options)


def test_the_recipe_makes_it_again(two, tmp_path):
    save_png(an_image(40, 30), tmp_path / "photo.png")
    made = upscale(tmp_path / "photo.png", Upscaler.load(two), tile=128)
    save_png(made, tmp_path / "large.png")
    recipe = read_recipe(open_image(tmp_path / "large.png").info)
    assert recipe.task == "upscale" and recipe.sources["upscaler"]["file"] == "2x.safetensors"
    again = TASKS["upscale"](None, recipe, {"image": tmp_path / "photo.png", "upscaler": two})
    assert np.array_equal(np.asarray(made), np.asarray(again))
