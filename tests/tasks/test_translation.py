"""Inverting and translating images with whole tiny pipelines."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import get_args

import numpy as np
import pytest
import torch
from diffusers import DDIMInverseScheduler
from PIL import Image
from safetensors.torch import save_file

from latentdiff.diffusion.denoise import Cancelled
from latentdiff.errors import CheckpointError, DataError, UsageError
from latentdiff.image import to_tensor
from latentdiff.recipe import read_recipe
from latentdiff.request.options import InversionName, TranslationName
from latentdiff.tasks.features import PnPSpec
from latentdiff.tasks.inversion import Inversion, invert, reconstruct
from latentdiff.tasks.inversion.artefact import psnr
from latentdiff.tasks.translation import NegativeBlend, again, translate
from tests import peers

STEPS = 4


@cache
def ours(family: str = "sd1"):
    return peers.ours(family)


def an_image(width: int = 64, height: int = 64) -> Image.Image:
    ramp = np.linspace(0, 255, width * height * 3).reshape(height, width, 3)
    return Image.fromarray((ramp * np.array([1.0, 0.5, 0.2]) + np.array([0, 80, 30])).clip(0, 255).astype(np.uint8))


@cache
def inverted(method: str = "fixed-point") -> Inversion:
    return invert(ours(), an_image(), method=method, prompt="the cat", steps=STEPS)


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


# --- Inversion ------------------------------------------------------------------------------------


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("family", peers.FAMILIES)
@torch.no_grad()
def test_same_noise_as_diffusers_inverse_scheduler(family, spacing):
    peer = peers.theirs(family)
    scheduler = DDIMInverseScheduler.from_config(
        {**peer.scheduler.config, "timestep_spacing": spacing, "clip_sample": False}
    )
    scheduler.set_timesteps(10)
    x = peer.vae.encode(to_tensor([an_image()])).latent_dist.mode() * peer.vae.config.scaling_factor
    words, _ = peer.encode_prompt("a photo of the cat", "cpu", 1, False)
    for t in scheduler.timesteps:
        x = scheduler.step(peer.unet(x, t, words).sample, t, x).prev_sample
    found = invert(
        ours(family),
        an_image(),
        prompt="a photo of the cat",
        method="ddim-high",
        steps=10,
        spacing=spacing,
        measure=False,
    )
    torch.testing.assert_close(found.latents[:1], x, rtol=0, atol=1e-4 * x.std().item())


@pytest.mark.parametrize("method", get_args(InversionName))
def test_every_inversion_leads_back(method):
    found = inverted(method)
    assert found.latents.shape == (STEPS + 1, 4, 8, 8)
    assert found.levels[-1].is_clean and found.levels[0].sigma > found.levels[1].sigma
    assert found.size == (64, 64)
    expected = ours().encode_images(to_tensor([an_image()])).mode()
    torch.testing.assert_close(found.latents[-1:], expected)
    assert found.reconstruction_db is not None and found.floor_db is not None
    own = psnr(ours().decode(found.latents[-1:]), to_tensor([an_image()]))
    assert found.floor_db == pytest.approx(own)
    if method == "edict":  # exact but for float32
        torch.testing.assert_close(reconstruct(ours(), found), expected, rtol=0, atol=1e-3)
    assert set(found.noise_statistics()) == {"mean", "std", "autocorrelation"}


def test_better_inversions_lead_back_nearer():
    def error(found: Inversion) -> float:
        return (reconstruct(ours(), found) - found.latents[-1:]).square().mean().item()

    more = invert(ours(), an_image(), prompt="the cat", steps=STEPS, iterations=30, measure=False)
    assert error(more) < 0.1 * error(inverted()) and error(more) < 0.1 * error(inverted("ddim-high"))


def test_null_text_stays_nearer_to_the_source_under_guidance():
    found = inverted("null-text")
    assert found.nulls.shape == (STEPS, 77, 32)
    plain = replace(found, nulls=ours().encode([""]).expand(STEPS, -1, -1))
    errors = [(reconstruct(ours(), one) - found.latents[-1:]).square().mean().item() for one in (found, plain)]
    assert errors[0] <= errors[1]
    assert all(parameter.requires_grad for parameter in ours().unet.parameters())


def test_an_image_of_any_shape_is_inverted_and_comes_back_in_its_size():
    odd = an_image(70, 41)
    found = invert(ours(), odd, steps=2)
    assert found.latents.shape[1:] == (4, 6, 9)
    assert found.size == (70, 41)
    (image,) = translate(ours(), found, "red fox")
    assert image.size == (70, 41)
    turned = odd.copy()
    turned.getexif()[0x0112] = 6  # to be turned by 90 degrees
    assert invert(ours(), turned, steps=1, measure=False).size == (41, 70)
    assert invert(ours(), an_image(1, 1), steps=1, measure=False).latents.shape[1:] == (4, 1, 1)


def test_inversion_is_cancelled_by_the_callback():
    with pytest.raises(Cancelled, match="after step 2 of 4"):
        invert(ours(), an_image(), steps=STEPS, callback=lambda index, t, x0: index < 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "magic"}, "method to be one of fixed-point"),
        ({"steps": 0}, "steps to be a whole number of 1 or more"),
        ({"guidance_scale": 3.0}, "no guidance in the inversion fixed-point"),
        ({"mixing": 0.9}, "mixing belongs to the inversion edict"),
        ({"method": "edict", "mixing": 0.4}, "mixing p of EDICT above 0.5"),
        ({"iterations": -1}, "iterations to be a whole number of 0 or more"),
        ({"width": 0}, "width to be a whole number of 1 or more"),
    ],
)
def test_wrong_options_of_the_inversion_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        invert(ours(), an_image(), **{"steps": 2, **options})


# --- The artefact ---------------------------------------------------------------------------------


@pytest.mark.parametrize("method", get_args(InversionName))
def test_an_inversion_is_saved_and_loaded_whole(method, tmp_path):
    found = inverted(method)
    found.save(tmp_path / "photo.inversion")
    again = Inversion.load(tmp_path / "photo.inversion")
    for name, value in vars(found).items():
        if isinstance(value, torch.Tensor):
            assert getattr(again, name).equal(value), name
        else:
            assert getattr(again, name) == value, name


def test_files_that_are_no_inversions_are_refused(tmp_path):
    path = tmp_path / "some.inversion"
    with pytest.raises(DataError, match="no inversion at"):
        Inversion.load(path)
    path.write_bytes(b"not a tensor file")
    with pytest.raises(DataError, match="cannot read"):
        Inversion.load(path)
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(DataError, match="another safetensors file"):
        Inversion.load(path)
    save_file({"x": torch.zeros(1)}, path, metadata={"format": "latentdiff.inversion", "schema": "2"})
    with pytest.raises(DataError, match="newer latentdiff"):
        Inversion.load(path)
    replace(inverted(), latents=inverted().latents[1:]).save(path)
    with pytest.raises(DataError, match="damaged inversion: expected latents of shape"):
        Inversion.load(path)


def test_an_inversion_made_with_another_model_is_refused():
    other = replace(inverted(), model="other", model_hash="0123456789abcdef")
    for use in (lambda: translate(ours(), other, "red fox"), lambda: reconstruct(ours(), other)):
        with pytest.raises(
            CheckpointError, match="made with the model 'other' .hash 0123456789., this one has the hash"
        ):
            use()


def test_thinning_keeps_both_ends():
    thin = inverted().thinned(2)
    assert thin.levels == tuple(inverted().levels[i] for i in (0, 2, 4))
    assert thin.latents.equal(inverted().latents[[0, 2, 4]])
    with pytest.raises(UsageError, match="1 to 4 steps"):
        inverted().thinned(5)
    with pytest.raises(UsageError, match="its own 4 steps only"):
        inverted("edict").thinned(2)


# --- Translation ----------------------------------------------------------------------------------


def source_of(method: str) -> Inversion:
    return inverted(method if method in ("edict", "null-text") else "fixed-point")


@pytest.mark.parametrize("method", get_args(TranslationName))
def test_every_method_makes_images_that_their_recipe_makes_again(method, tmp_path):
    path = tmp_path / "photo.inversion"
    source_of(method).save(path)
    images = translate(ours(), path, ["red fox", "two cat"], method=method, batch_size=2)
    assert [image.size for image in images] == [(64, 64)] * 2
    if method != "replay":
        assert (pixels(images[0]) != pixels(images[1])).any()
    recipe = read_recipe(images[1].info)
    assert (recipe.task, recipe.prompt, recipe.steps) == ("translate", "two cat", STEPS)
    assert recipe.sources["inversion"]["file"] == "photo.inversion"
    repeated = again(ours(), recipe, {"inversion": path})
    assert np.abs(pixels(repeated) - pixels(images[1])).max() <= 2


def test_an_image_is_inverted_on_the_way_and_its_recipe_does_so_again(tmp_path):
    path = tmp_path / "photo.png"
    an_image().save(path)
    options = {"iterations": 2, "spacing": "trailing"}
    (image,) = translate(
        ours(), path, "red fox", source_prompt="the cat", steps=3, guidance_scale=3.0, inversion=options
    )
    recipe = read_recipe(image.info)
    assert recipe.sources["image"]["file"] == "photo.png"
    assert recipe.task_settings["inversion"]["iterations"] == 2
    assert pixels(again(ours(), recipe, {"image": path})).tolist() == pixels(image).tolist()
    found = invert(ours(), path, prompt="the cat", steps=3, **options)
    (same,) = translate(ours(), found, "red fox", guidance_scale=3.0)
    assert pixels(same).tolist() == pixels(image).tolist()


def test_replay_is_the_source_whatever_the_prompt():
    better = invert(ours(), an_image(), steps=STEPS, iterations=30, measure=False)
    (image,) = translate(ours(), better, "red fox", method="replay")
    (floor,) = ours().decode(better.latents[-1:])
    assert np.abs(pixels(image) - ((floor / 2 + 0.5).clamp(0, 1) * 255).permute(1, 2, 0).numpy()).max() <= 3


def test_features_direct_and_the_plain_edit_are_three_things():
    made = [
        pixels(translate(ours(), inverted(), "red fox", method=method)[0]) for method in ("features", "direct", "ddim")
    ]
    assert (made[0] != made[1]).any() and (made[1] != made[2]).any() and (made[0] != made[2]).any()


def test_no_share_of_injection_is_the_plain_edit():
    none = translate(ours(), inverted(), "red fox", tau_f=0.0, tau_attn=0.0)[0]
    assert pixels(none).tolist() == pixels(translate(ours(), inverted(), "red fox", method="ddim")[0]).tolist()


@pytest.mark.parametrize(("schedule", "expected"), [("linear", [0.5, 0.25]), ("constant", [0.5, 0.5])])
def test_shares_of_the_negative_blend(schedule, expected):
    blend = NegativeBlend(schedule=schedule, alpha=0.5)
    assert [blend.share_of_empty(index, 4) for index in (0, 2)] == pytest.approx(expected)


def test_a_negative_blend_lies_between_empty_and_negative():
    blend = NegativeBlend(schedule="exponential")
    assert blend.share_of_empty(2, 4) == pytest.approx(np.exp(-3.0))
    blended, empty = (
        pixels(translate(ours(), inverted(), "red fox", negative_prompt="the cat", negative_blend=one)[0])
        for one in (blend, NegativeBlend(schedule="constant"))
    )
    alone = pixels(translate(ours(), inverted(), "red fox")[0])
    assert np.abs(empty - alone).max() <= 1  # the constant share 1 leaves the negative prompt out
    assert (blended != alone).any()


def test_translation_is_cancelled_by_the_callback():
    with pytest.raises(Cancelled, match="after step 2 of 4"):
        translate(ours(), inverted(), "red fox", callback=lambda index, t, x0: index < 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "magic"}, "method to be one of features"),
        ({"method": "ddim", "tau_f": 0.5}, "no choice of features with the method ddim"),
        ({"method": "direct", "tau_f": 0.5}, "takes no features"),
        ({"method": "negative-prompt", "negative_prompt": "x"}, "which has its own"),
        ({"method": "edict"}, "needs an inversion by edict, found one by fixed-point"),
        ({"tau_attn": 2.0}, "tau_attn to be a finite number of 0 to 1"),
        ({"spec": PnPSpec(("up_blocks.9.resnets.0",), ())}, "name of a module"),
        ({"steps": 9}, "1 to 4 steps"),
        ({"source_prompt": "a cat"}, "inverted already"),
        ({"inversion": {"iterations": 3}}, "inverted already"),
    ],
)
def test_wrong_options_of_the_translation_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        translate(ours(), inverted(), "red fox", **options)


def test_guidance_is_that_which_the_inversion_was_made_for():
    with pytest.raises(UsageError, match="made for a guidance of 3.0, found 7.0"):
        translate(ours(), inverted("edict"), "red fox", method="edict", guidance_scale=7.0)


def test_a_negative_blend_is_checked():
    with pytest.raises(UsageError, match="one of linear"):
        NegativeBlend(schedule="steep")
    with pytest.raises(UsageError, match="alpha in 0 to 1"):
        NegativeBlend(alpha=2.0)
