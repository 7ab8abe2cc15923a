"""The x4 upscaler of SD 2, which sees a small image under noise and is told how much."""

from __future__ import annotations

import json
from functools import cache

import pytest

from latentdiff.checkpoints.conversion import convert
from latentdiff.checkpoints.inspection import inspect
from latentdiff.errors import UsageError
from latentdiff.image import save_png
from latentdiff.pipeline import Pipeline
from latentdiff.recipe import read_recipe
from latentdiff.tasks import TASKS, enlarge, image_to_image
from tests import peers
from tests.tasks.images import SCHEDULERS, an_image, apart, in_diffusers

shared = cache(peers.ours)
QUICK = {"steps": 3, "seed": 3, "progress": False}


@pytest.mark.parametrize(("sampler", "noise_level"), [("ddim", 20), ("ddim", 350), ("ddpm", 0), ("euler", 100)])
def test_same_image_as_diffusers(sampler, noise_level):
    expected = in_diffusers(
        "own", "x4", sampler, [7, 8], prompt="a red fox", negative_prompt="blue", image=an_image(24, 16),
        num_inference_steps=5, guidance_scale=4.0, noise_level=noise_level,
    )  # fmt: skip
    images = enlarge(
        shared("x4"), an_image(24, 16), "a red fox", negative_prompt="blue", steps=5, sampler=sampler, seed=7, num_images=2,
        spacing=SCHEDULERS[sampler][1], guidance_scale=4.0, noise_level=noise_level, progress=False,
    )  # fmt: skip
    assert images[0].size == (96, 64) and expected.std() > 20
    assert all(apart(image, other) <= 1 for image, other in zip(images, expected, strict=True))


def test_any_size_and_windows_and_the_recipe(tmp_path):
    save_png(an_image(21, 13), tmp_path / "photo.png")
    (image,) = enlarge(shared("x4"), tmp_path / "photo.png", noise_level=50, window=48, **QUICK)
    assert image.size == (84, 52)
    recipe = read_recipe(image.info)
    assert recipe.task_settings == {"noise_level": 50} and recipe.guidance_scale == 9.0
    assert apart(TASKS[recipe.task](shared("x4"), recipe, {"image": tmp_path / "photo.png"}), image) == 0


def test_low_memory_and_other_engines_see_the_text_where_others_see_themselves():
    (plain,) = enlarge(shared("x4"), an_image(16, 16), "cat", **QUICK)
    pipe = Pipeline.load(peers.folder("x4"), device="cpu", precision="fp32", low_memory=True)
    assert apart(enlarge(pipe, an_image(16, 16), "cat", **QUICK)[0], plain) == 0


def test_single_file_there_and_back(tmp_path):
    folder, file, back = peers.folder("x4"), tmp_path / "x4.safetensors", tmp_path / "back"
    convert(folder, file)
    convert(file, back)
    assert inspect(file).family.startswith("Stable Diffusion 2.x upscaling by 4") and not inspect(back).problem
    index = json.loads((back / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionUpscalePipeline"
    assert (back / "low_res_scheduler" / "scheduler_config.json").exists()
    images = [
        enlarge(Pipeline.load(place, device="cpu", precision="fp32"), an_image(16, 16), "cat", **QUICK)[0]
        for place in (folder, file, back)
    ]
    assert apart(images[0], images[1]) == apart(images[0], images[2]) == 0


def test_what_does_not_fit_is_refused_in_one_line():
    with pytest.raises(UsageError, match="found 7: this model makes images four times as large: latentdiff upscale"):
        shared("x4")("cat", **QUICK)
    with pytest.raises(UsageError, match="this model makes images four times as large"):
        image_to_image(shared("x4"), an_image(16, 16), "cat", **QUICK)
    with pytest.raises(UsageError, match="noise_level to be a whole number of 0 to 350"):
        enlarge(shared("x4"), an_image(16, 16), noise_level=400, **QUICK)
    with pytest.raises(UsageError, match="expected the noise_source cpu with this model, found nv"):
        enlarge(shared("x4"), an_image(16, 16), noise_source="nv", **QUICK)
