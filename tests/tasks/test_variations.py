"""Variations of an image by unCLIP models."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from latentdiff.checkpoints.conversion import convert
from latentdiff.checkpoints.inspection import inspect
from latentdiff.errors import CheckpointError, UsageError
from latentdiff.image import save_png
from latentdiff.pipeline import Pipeline
from latentdiff.recipe import read_recipe
from latentdiff.tasks import TASKS, image_to_image, vary
from tests import peers
from tests.tasks.images import SCHEDULERS, an_image, apart, in_diffusers

shared = cache(peers.ours)
QUICK = {"steps": 3, "seed": 3, "progress": False}


@pytest.mark.parametrize(("sampler", "noise_level"), [("ddim", 0), ("ddim", 600), ("euler", 200)])
def test_same_image_as_diffusers(sampler, noise_level):
    expected = in_diffusers(
        "own", "unclip", sampler, [7, 8], prompt="a red fox", negative_prompt="blue", image=an_image(48, 48),
        height=64, width=48, num_inference_steps=5, guidance_scale=4.0, noise_level=noise_level,
    )  # fmt: skip
    images = vary(
        shared("unclip"), an_image(48, 48), "a red fox", negative_prompt="blue", steps=5, sampler=sampler, seed=7,
        num_images=2, height=64, width=48, spacing=SCHEDULERS[sampler][1], guidance_scale=4.0, noise_level=noise_level,
        progress=False,
    )  # fmt: skip
    assert expected.std() > 20
    assert all(apart(image, other) <= 1 for image, other in zip(images, expected, strict=True))


def test_the_image_is_followed_and_the_recipe_makes_it_again(tmp_path):
    save_png(an_image(40, 30), tmp_path / "photo.png")
    (image,) = vary(shared("unclip"), tmp_path / "photo.png", noise_level=50, **QUICK)
    recipe = read_recipe(image.info)
    assert recipe.task_settings == {"noise_level": 50}
    assert apart(TASKS[recipe.task](shared("unclip"), recipe, {"image": tmp_path / "photo.png"}), image) == 0
    (other,) = vary(shared("unclip"), Image.new("RGB", (40, 30), "red"), noise_level=50, **QUICK)
    assert apart(image, other) > 1


def test_prompts_of_several_lengths_and_parts_keep_their_rows():
    long = "a red fox " * 30
    images = vary(
        shared("unclip"), an_image(), [long, "cat", "fox AND dog"], noise_level=300, **{**QUICK, "seed": [1, 2, 3]}
    )
    for prompt, seed, image in zip([long, "cat", "fox AND dog"], [1, 2, 3], images, strict=True):
        (alone,) = vary(shared("unclip"), an_image(), prompt, noise_level=300, **{**QUICK, "seed": seed})
        assert apart(image, alone) <= 1


def test_single_file_there_and_back(tmp_path):
    folder, file, back = peers.folder("unclip"), tmp_path / "model.safetensors", tmp_path / "back"
    convert(folder, file)
    convert(file, back)
    assert (
        inspect(file).family.startswith("Stable Diffusion 2.x for variations of images") and not inspect(back).problem
    )
    for part in ("image_encoder/model", "image_normalizer/diffusion_pytorch_model", "unet/diffusion_pytorch_model"):
        before, after = (load_file(place / f"{part}.safetensors") for place in (folder, back))
        assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    names = load_file(file).keys()
    assert {"embedder.model.visual.transformer.resblocks.0.attn.in_proj_weight", "embedder.model.visual.proj"} <= names
    images = [
        vary(Pipeline.load(place, device="cpu", precision="fp32"), an_image(), "cat", noise_level=100, **QUICK)[0]
        for place in (folder, file, back)
    ]
    assert apart(images[0], images[1]) == apart(images[0], images[2]) == 0


def test_the_folder_of_a_single_file_is_the_same_model_in_diffusers(tmp_path):
    from diffusers import StableUnCLIPImg2ImgPipeline

    convert(peers.folder("unclip"), tmp_path / "model.safetensors")
    convert(tmp_path / "model.safetensors", tmp_path / "back")
    made = []
    for folder in (peers.folder("unclip"), tmp_path / "back"):
        pipe = StableUnCLIPImg2ImgPipeline.from_pretrained(folder)
        pipe.set_progress_bar_config(disable=True)
        seed = torch.Generator().manual_seed(1)
        made.append(pipe(an_image(48, 48), "cat", height=64, width=64, num_inference_steps=2, generator=seed).images[0])
    assert np.array_equal(*map(np.asarray, made))


def test_a_file_without_statistics_says_so_where_they_matter(tmp_path):
    """The published single files have none; their towers are beside names that nothing here uses."""
    convert(peers.folder("unclip"), tmp_path / "all.safetensors")
    tensors = load_file(tmp_path / "all.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if "data_" not in name}
    kept |= {"embedder.model.logit_scale": torch.ones(()), "noise_augmentor.betas": torch.rand(10)}
    with safe_open(tmp_path / "all.safetensors", "pt") as opened:
        save_file(kept, tmp_path / "file.safetensors", opened.metadata())
    pipe = Pipeline.load(tmp_path / "file.safetensors", device="cpu", precision="fp32")
    assert apart(vary(pipe, an_image(), **QUICK)[0], vary(shared("unclip"), an_image(), **QUICK)[0]) <= 1
    with pytest.warns(UserWarning, match="does not hold the mean and deviation"):
        vary(pipe, an_image(), noise_level=100, **QUICK)
    without = {name: tensor for name, tensor in kept.items() if not name.startswith("embedder.")}
    with safe_open(tmp_path / "all.safetensors", "pt") as opened:
        save_file(without, tmp_path / "blind.safetensors", opened.metadata())
    with pytest.raises(CheckpointError, match="an unCLIP model without its image encoder"):
        Pipeline.load(tmp_path / "blind.safetensors")


def test_saving_keeps_all_of_it(tmp_path):
    shared("unclip").save(tmp_path / "saved")
    (again,) = vary(
        Pipeline.load(tmp_path / "saved", device="cpu", precision="fp32"), an_image(), noise_level=9, **QUICK
    )
    assert apart(again, vary(shared("unclip"), an_image(), noise_level=9, **QUICK)[0]) == 0


def test_what_does_not_fit_is_refused_in_one_line():
    with pytest.raises(UsageError, match="this model makes variations of an image: latentdiff vary IMAGE"):
        shared("unclip")("cat", **QUICK)
    with pytest.raises(UsageError, match="this model makes variations of an image"):
        image_to_image(shared("unclip"), an_image(), "cat", **QUICK)
    with pytest.raises(UsageError, match="expected an unCLIP model, .* found one for text"):
        vary(shared("sd1"), an_image(), "cat", **QUICK)
    with pytest.raises(UsageError, match="noise_level to be a whole number of 0 to 999"):
        vary(shared("unclip"), an_image(), noise_level=1000, **QUICK)
