"""The depth model of SD 2, which sees how near the things of an image are."""

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
from latentdiff.tasks import TASKS, image_to_image
from tests import peers
from tests.tasks.images import SCHEDULERS, an_image, apart, in_diffusers

shared = cache(peers.ours)
QUICK = {"steps": 4, "seed": 3, "progress": False}


def a_map(width: int = 64, height: int = 64) -> Image.Image:
    """Nearer towards the bottom, and a near disc."""
    down, right = np.mgrid[0:height, 0:width]
    disc = (down - height / 2) ** 2 + (right - width / 3) ** 2 < (min(width, height) / 4) ** 2
    return Image.fromarray(np.where(disc, 240, down * 150 // height).astype(np.uint8))


@pytest.mark.parametrize("strength", [0.55, 1.0])
@pytest.mark.parametrize("sampler", ["ddim", "euler"])
@pytest.mark.parametrize("given", ["map", "estimator"])
def test_same_image_as_diffusers(given, sampler, strength):
    depth = torch.from_numpy(np.asarray(a_map()).astype(np.float32))[None] if given == "map" else None
    expected = in_diffusers(
        "own", "depth", sampler, [7, 8], prompt="a red fox", negative_prompt="blue", image=an_image(), depth_map=depth,
        strength=strength, num_inference_steps=8, guidance_scale=5.0,
    )  # fmt: skip
    images = image_to_image(
        shared("depth"), an_image(), "a red fox", negative_prompt="blue", strength=strength, steps=8, sampler=sampler,
        spacing=SCHEDULERS[sampler][1], seed=7, num_images=2, depth=a_map() if given == "map" else None, progress=False,
    )  # fmt: skip
    assert expected.std() > 20
    assert all(apart(image, other) <= 1 for image, other in zip(images, expected, strict=True))


def test_the_recipe_makes_it_again(tmp_path):
    save_png(an_image(24, 20), tmp_path / "photo.png")
    save_png(a_map(24, 20), tmp_path / "map.png")
    estimator = peers.folder("depth") / "depth_estimator"
    made = {}
    for depth, role in ((tmp_path / "map.png", "depth"), (estimator, "depth_model"), (None, None)):
        (image,) = image_to_image(shared("depth"), tmp_path / "photo.png", "cat", depth=depth, **QUICK)
        recipe = read_recipe(image.info)
        assert set(recipe.sources) - {"image"} == ({role} if role else set())
        sources = {"image": tmp_path / "photo.png"} | ({role: depth} if role else {})
        assert apart(TASKS[recipe.task](shared("depth"), recipe, sources), image) == 0
        made[role] = image
    assert apart(made["depth"], made[None]) > 1 and apart(made["depth_model"], made[None]) == 0


def test_maps_of_other_sizes_and_of_16_bits_say_the_same():
    source = an_image(60, 44)  # extended to whole cells
    (plain,) = image_to_image(shared("depth"), source, "cat", depth=a_map(60, 44), **QUICK)
    deep = Image.fromarray(np.asarray(a_map(60, 44)).astype(np.uint16) * 257)
    (sixteen,) = image_to_image(shared("depth"), source, "cat", depth=deep, **QUICK)
    assert plain.size == (60, 44) and apart(plain, sixteen) <= 1
    large = a_map(60, 44).resize((120, 88), Image.Resampling.BILINEAR)
    (from_large,) = image_to_image(shared("depth"), source, "cat", depth=large, **QUICK)
    difference = np.abs(np.asarray(plain).astype(int) - np.asarray(from_large)).mean()
    (other,) = image_to_image(shared("depth"), source, "cat", depth=a_map(60, 44).rotate(180), **QUICK)
    assert difference < 0.3 * np.abs(np.asarray(plain).astype(int) - np.asarray(other)).mean()


def test_single_file_there_and_back(tmp_path):
    """The original file holds MiDaS, whose tensors come along; the folder's estimator does not go into a file."""
    folder, file = peers.folder("depth"), tmp_path / "model.safetensors"
    assert any("depth_estimator" in note for note in convert(folder, file))
    midas = {"depth_model.model.scratch.layer1_rn.weight": torch.rand(2, 2)}
    tensors = load_file(file) | midas
    with safe_open(file, "pt") as opened:
        save_file(tensors, tmp_path / "original.safetensors", opened.metadata())
    assert inspect(tmp_path / "original.safetensors").problem == ""
    convert(tmp_path / "original.safetensors", tmp_path / "back")
    convert(tmp_path / "back", tmp_path / "again.safetensors")
    again = load_file(tmp_path / "again.safetensors")
    assert again.keys() == tensors.keys() and all(torch.equal(again[name], tensors[name]) for name in tensors)
    assert inspect(tmp_path / "back").family.startswith("Stable Diffusion 2.x conditioned on depth")
    pipes = [Pipeline.load(place, device="cpu", precision="fp32") for place in (folder, file)]
    images = [image_to_image(pipe, an_image(), "cat", depth=a_map(), **QUICK)[0] for pipe in pipes]
    assert apart(*images) == 0


def test_the_folder_of_a_single_file_opens_in_diffusers(tmp_path):
    from diffusers import StableDiffusionDepth2ImgPipeline

    convert(peers.folder("depth"), tmp_path / "model.safetensors")
    convert(tmp_path / "model.safetensors", tmp_path / "back")
    theirs = peers.theirs("depth")
    pipe = StableDiffusionDepth2ImgPipeline.from_pretrained(
        tmp_path / "back", depth_estimator=theirs.depth_estimator, feature_extractor=theirs.feature_extractor
    )
    assert pipe.unet.config.in_channels == 5


def test_what_does_not_fit_is_refused_in_one_line(tmp_path):
    pipe = shared("depth")
    with pytest.raises(UsageError, match="found 5: this model sees the depths of an image: latentdiff edit IMAGE"):
        pipe("cat", **QUICK)
    with pytest.raises(UsageError, match="expected no depth with this model"):
        image_to_image(shared("sd1"), an_image(), "cat", depth=a_map(), **QUICK)
    with pytest.raises(UsageError, match="proportions of the image, 64 x 64 pixels, found 64 x 40"):
        image_to_image(pipe, an_image(), "cat", depth=a_map(64, 40), **QUICK)
    with pytest.raises(UsageError, match="found the same everywhere"):
        image_to_image(pipe, an_image(), "cat", depth=Image.new("L", (64, 64), 9), **QUICK)
    with pytest.raises(CheckpointError, match="expected a folder of a depth model"):
        image_to_image(pipe, an_image(), "cat", depth=tmp_path, **QUICK)
    convert(peers.folder("depth"), tmp_path / "model.safetensors")
    with pytest.raises(UsageError, match="no estimator of them; give a map"):
        image_to_image(Pipeline.load(tmp_path / "model.safetensors"), an_image(), "cat", **QUICK)
