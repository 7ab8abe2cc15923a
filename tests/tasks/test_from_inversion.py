"""Editing and inpainting that begin from an inversion."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from latentdiff import Pipeline
from latentdiff.errors import CheckpointError, UsageError
from latentdiff.image import save_png, to_pil, to_tensor
from latentdiff.recipe import read_recipe
from latentdiff.request.plan import Sampling
from latentdiff.tasks import TASKS, image_to_image, inpaint
from latentdiff.tasks.inpainting_walk import starts_on_trajectory
from latentdiff.tasks.inversion import Inversion, invert, reconstruct
from latentdiff.tasks.inversion.artefact import psnr
from latentdiff.tasks.masks import latent_mask
from tests import peers
from tests.tasks.images import an_image, apart, mask, pixels

STEPS = 4
NEUTRAL = {"guidance_scale": 1.0, "seed": 1, "progress": False}

shared = cache(peers.ours)


@cache
def inverted(method: str = "fixed-point", iterations: int = 8) -> Inversion:
    return invert(
        shared("sd1"), an_image(), method=method, prompt="the cat", steps=STEPS, iterations=iterations, progress=False
    )


@pytest.fixture
def photo(tmp_path) -> Path:
    save_png(an_image(), tmp_path / "photo.png")
    return tmp_path / "photo.png"


@cache
def scene() -> tuple[Pipeline, Image.Image, Inversion]:
    """The embedded model, an image of its own, and how it was inverted: random weights lead too far astray to come
    back."""
    pipe = Pipeline.load(device="cpu", precision="fp32")
    (own,) = pipe("a cat on a blue background", seed=3, steps=10, progress=False)
    return pipe, own, invert(pipe, own, prompt="a cat on a blue background", steps=20, progress=False)


@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_the_image_comes_back_under_its_own_prompt(strength):
    pipe, own, found = scene()
    (image,) = image_to_image(pipe, found, found.prompt, strength=strength, **NEUTRAL)
    back = psnr(to_tensor([image]), to_tensor([own]))
    assert back >= found.reconstruction_db - 0.1  # which is the error of all of its steps
    if strength == 1.0:
        assert apart(image, to_pil(pipe.decode(reconstruct(pipe, found)))[0]) <= 1
    (noised,) = image_to_image(pipe, own, found.prompt, strength=strength, steps=20, **NEUTRAL)
    assert psnr(to_tensor([noised]), to_tensor([own])) < back - 3.0


def test_no_strength_is_what_the_vae_keeps():
    (floor,) = to_pil(shared("sd1").decode(inverted().latents[-1:]))
    (image,) = image_to_image(shared("sd1"), inverted(), "red fox", strength=0.0, **NEUTRAL)
    assert apart(image, floor) == 0


def test_every_second_step_and_other_samplers_fit():
    for options in ({"steps": 2}, {"sampler": "euler"}, {"sampler": "ddpm", "strength": 0.5}):
        images = image_to_image(shared("sd1"), inverted(), ["red fox", "two cat"], **options, **NEUTRAL)
        assert apart(*images) > 0


WRONG_STEPS = [{"steps": 3, "strength": 1.0}, {"spacing": "trailing"}, {"fast": True}, {"spacing": "karras"}]


@pytest.mark.parametrize("options", WRONG_STEPS)
def test_steps_that_the_inversion_does_not_hold_are_refused(options):
    with pytest.raises(UsageError, match="holds no latents at timestep .* take its own 4 steps"):
        image_to_image(shared("sd1"), inverted(), "red fox", **options, **NEUTRAL)
    with pytest.raises(UsageError, match="holds no latents at timestep"):
        inpaint(shared("sd1"), an_image(), mask((8, 8, 40, 40)), "red fox", inversion=inverted(), **options, **NEUTRAL)


def test_another_model_and_another_size_are_refused():
    other = replace(inverted(), model="other", model_hash="0123456789abcdef")
    with pytest.raises(CheckpointError, match="made with the model 'other'"):
        image_to_image(shared("sd1"), other, "red fox")
    with pytest.raises(CheckpointError, match="made with the model 'other'"):
        inpaint(shared("sd1"), an_image(), mask((8, 8, 40, 40)), "red fox", inversion=other)
    with pytest.raises(UsageError, match="no size with an inversion"):
        image_to_image(shared("sd1"), inverted(), "red fox", width=32)


def test_an_edit_from_a_file_is_made_again_from_it(tmp_path):
    path = tmp_path / "photo.inversion"
    inverted().save(path)
    (image,) = image_to_image(shared("sd1"), path, "red fox", sampler="ddpm", seed=3, progress=False)
    recipe = read_recipe(image.info)
    assert recipe.sources["inversion"]["file"] == "photo.inversion" and recipe.steps == STEPS
    assert apart(TASKS["edit"](shared("sd1"), recipe, {"inversion": path}), image) == 0


def test_an_edit_from_memory_is_made_again_from_the_image(photo):
    found = invert(shared("sd1"), photo, prompt="the cat", steps=STEPS, spacing="trailing", measure=False)
    (image,) = image_to_image(shared("sd1"), found, "red fox", seed=3, progress=False)
    recipe = read_recipe(image.info)
    assert list(recipe.sources) == ["image"]
    assert apart(TASKS["edit"](shared("sd1"), recipe, {"image": photo}), image) == 0


# --- Inpainting -----------------------------------------------------------------------------------

BOX = (16, 16, 48, 48)
MIDDLE = (7 / 24, 17 / 24)  # of the side


def test_the_hole_comes_back_under_its_own_prompt():
    pipe, own, found = scene()
    first, last = (round(share * own.width) for share in MIDDLE)
    hole = mask((first, first, last, last), *own.size)
    inside = np.asarray(hole) > 0
    options = {"steps": 20, **NEUTRAL}
    images = [inpaint(pipe, own, hole, found.prompt, inversion=one, **options)[0] for one in (found, None)]
    away, away_plain = (np.square(pixels(image) - pixels(own))[inside].mean() for image in images)
    assert away < 0.1 * away_plain, (away, away_plain)
    assert not (pixels(images[0]) != pixels(own))[~inside].any()


def test_what_is_kept_stays_on_the_trajectory():
    pipe, found = shared("sd1"), inverted()
    plan = Sampling(steps=STEPS, seed=1).plan("red fox", pipe.schedule)
    cells = latent_mask(mask(BOX), pipe.vae.config.downscale)
    start = starts_on_trajectory(found, cells, pipe.encode_images(to_tensor([an_image()])), plan)(slice(0, 2), None)
    assert start.x.equal(found.latents[:1].repeat(2, 1, 1, 1))
    for level, known in zip(plan.levels, found.latents, strict=True):
        x = torch.randn(2, *known.shape, generator=torch.Generator().manual_seed(0))
        held = start.after_step(x, level)
        assert held.equal(torch.where(cells > 0, x, known))


def test_an_inpainting_from_a_file_or_memory_is_made_again(photo, tmp_path):
    path, area = tmp_path / "photo.inversion", tmp_path / "mask.png"
    save_png(mask(BOX), area)
    invert(shared("sd1"), photo, prompt="the cat", steps=STEPS, measure=False).save(path)
    for given, roles in ((path, {"image", "mask", "inversion"}), (Inversion.load(path), {"image", "mask"})):
        (image,) = inpaint(shared("sd1"), photo, area, "red fox", inversion=given, seed=3, progress=False)
        recipe = read_recipe(image.info)
        assert set(recipe.sources) == roles
        files = {role: {"image": photo, "mask": area, "inversion": path}[role] for role in roles}
        assert apart(TASKS["inpaint"](shared("sd1"), recipe, files), image) == 0


@pytest.mark.parametrize("options", [{"remove": True}, {"only_masked": True}, {"extend": (8, 0, 0, 0)}])
def test_an_inversion_of_what_is_not_painted_on_is_refused(options):
    with pytest.raises(UsageError, match="no inversion with remove, only_masked or extend"):
        inpaint(shared("sd1"), an_image(), mask(BOX), "cat", inversion=inverted(), **options)


@pytest.mark.parametrize("other", [an_image(seed=0).transpose(0), an_image(56, 64)])
def test_an_inversion_of_another_image_is_refused(other):
    with pytest.raises(UsageError, match="an inversion of this image"):
        inpaint(shared("sd1"), other, mask((8, 8, 16, 16), *other.size), "cat", inversion=inverted(), progress=False)


def test_an_image_is_no_inversion(photo):
    with pytest.raises(UsageError, match="expected an inversion, which `latentdiff invert` makes"):
        inpaint(shared("sd1"), an_image(), mask(BOX), "cat", inversion=photo)
