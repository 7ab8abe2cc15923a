"""Models that follow instructions about an image (InstructPix2Pix)."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from PIL import Image

from latentdiff.checkpoints.conversion import convert
from latentdiff.checkpoints.inspection import inspect
from latentdiff.errors import UsageError
from latentdiff.image import save_png
from latentdiff.pipeline import Pipeline
from latentdiff.recipe import read_recipe
from latentdiff.tasks import TASKS, image_to_image, inpaint, invert
from tests import peers
from tests.tasks.images import SCHEDULERS, an_image, apart, in_diffusers, mask

shared = cache(peers.ours)
QUICK = {"steps": 4, "seed": 3, "progress": False}


@pytest.mark.parametrize("sampler", ["ddim", "euler", "dpmpp-2m"])
@pytest.mark.parametrize("scales", [(7.5, 1.5), (4.0, 1.0), (3.0, 2.5)])
def test_same_image_as_diffusers(sampler, scales):
    expected = in_diffusers(
        "own", "pix2pix", sampler, [7, 8], prompt="a red fox", negative_prompt="blue", image=an_image(),
        num_inference_steps=6, guidance_scale=scales[0], image_guidance_scale=scales[1],
    )  # fmt: skip
    images = image_to_image(
        shared("pix2pix"), an_image(), "a red fox", negative_prompt="blue", steps=6, sampler=sampler, seed=7, num_images=2,
        spacing=SCHEDULERS[sampler][1], guidance_scale=scales[0], image_guidance_scale=scales[1], progress=False,
    )  # fmt: skip
    assert expected.std() > 20
    assert all(apart(image, other) <= 1 for image, other in zip(images, expected, strict=True))


def test_each_scale_changes_the_image_and_the_default_is_the_authors():
    def made(**options) -> Image.Image:
        return image_to_image(shared("pix2pix"), an_image(), "cat", **QUICK, **options)[0]

    usual = made()
    assert apart(usual, made(image_guidance_scale=1.5)) == 0
    assert apart(usual, made(image_guidance_scale=3.0)) > 1
    assert apart(usual, made(guidance_scale=1.0)) > 1
    assert apart(usual, made(strength=0.5)) > 1  # begins from the image


def test_guidance_of_one_kind_alone_is_the_formula():
    """With a text scale of 1, what is left is e_text + (s - 1) (e_image - e_none); of that there is no pipeline elsewhere."""
    from latentdiff.diffusion.guidance import Guidance, guided_denoiser
    from latentdiff.diffusion.parameterization import parameterization
    from latentdiff.diffusion.schedule import Level

    means = torch.tensor([1.0, 2.0, 5.0])  # without the image, the negative prompt, the prompt

    def model(x, t, context):
        return context[:, None, None, :].expand_as(x)

    none, negative, text = (mean.reshape(1, 1) for mean in means)
    x, level = torch.zeros(1, 1, 1, 1), Level(500.0, 0.6, 0.8)
    for scale, image_scale, expected in [(1.0, 1.5, 5 + 0.5), (4.0, 1.5, 1 + 4 * 3 + 1.5), (4.0, 1.0, 2 + 4 * 3)]:
        guidance = Guidance(scale=scale, image_scale=image_scale)
        denoise = guided_denoiser(
            model, parameterization("epsilon"), text, negative, guidance, unseen=none if image_scale != 1.0 else None
        )
        assert denoise(x, level).raw.item() == pytest.approx(expected)


def test_the_recipe_makes_it_again(tmp_path):
    save_png(an_image(24, 20), tmp_path / "photo.png")
    (image,) = image_to_image(shared("pix2pix"), tmp_path / "photo.png", "cat", image_guidance_scale=1.2, **QUICK)
    recipe = read_recipe(image.info)
    assert recipe.task_settings["image_guidance_scale"] == 1.2 and recipe.task_settings["strength"] == 1.0
    again = TASKS[recipe.task](shared("pix2pix"), recipe, {"image": tmp_path / "photo.png"})
    assert apart(image, again) == 0


def test_any_size_windows_and_other_guidance_go_with_it():
    for options in ({"window": 24}, {"pag_scale": 2.0}, {"guidance_kind": "apg"}, {"guidance_interval": (1.0, 8.0)}):
        (image,) = image_to_image(shared("pix2pix"), an_image(37, 21), "cat", **QUICK, **options)
        assert image.size == (37, 21)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_single_file_there_and_back(tmp_path, precision):
    folder = peers.folder("pix2pix")
    convert(folder, tmp_path / "model.safetensors")
    convert(tmp_path / "model.safetensors", tmp_path / "back")
    assert "StableDiffusionInstructPix2PixPipeline" in (tmp_path / "back" / "model_index.json").read_text()
    assert "conditioned on an image" in inspect(tmp_path / "model.safetensors").family
    ours = [
        image_to_image(Pipeline.load(place, device="cpu", precision=precision), an_image(), "cat", **QUICK)[0]
        for place in (folder, tmp_path / "model.safetensors", tmp_path / "back")
    ]
    assert apart(ours[0], ours[1]) == apart(ours[0], ours[2]) == 0


def test_what_needs_other_models_is_refused_in_one_line():
    pipe = shared("pix2pix")
    with pytest.raises(UsageError, match="found 8: this model follows instructions about an image: latentdiff edit"):
        pipe("cat", **QUICK)
    with pytest.raises(UsageError, match="this model follows instructions"):
        inpaint(pipe, an_image(), mask((4, 4, 20, 20)), "cat", **QUICK)
    with pytest.raises(UsageError, match="this model follows instructions"):
        invert(pipe, an_image())
    with pytest.raises(UsageError, match="no image_guidance_scale with this model, found 2"):
        image_to_image(shared("sd1"), an_image(), "cat", image_guidance_scale=2, **QUICK)
    with pytest.raises(UsageError, match="goes with prompts without AND"):
        image_to_image(pipe, an_image(), "cat AND fox", **QUICK)
    with pytest.raises(UsageError, match="other kinds than cfg"):
        image_to_image(pipe, an_image(), "cat", **{**QUICK, "guidance_kind": "cfg++", "guidance_scale": 0.5})
    with pytest.raises(UsageError, match="image_guidance_scale to be a finite number of 0 or more"):
        image_to_image(pipe, an_image(), "cat", image_guidance_scale=-1, **QUICK)


def test_servers_hand_both_scales_on(tmp_path):
    """AUTOMATIC1111's clients may send the second scale to every model; there it means nothing to others."""
    from latentdiff.serving.drawing import drawn
    from latentdiff.serving.work import Draw, Piece, Sent

    def served(family: str, **task) -> Image.Image:
        save_png(an_image(), tmp_path / "photo.png")
        sent = Sent((tmp_path / "photo.png").read_bytes(), "photo.png")
        draw = Draw(model="", prompt="cat", image=sent, task=task, options={"steps": 4}, lenient=True)
        return drawn(shared(family), [Piece(1, 3, draw)], lambda *step: True, models=None)[0]

    (own,) = image_to_image(shared("pix2pix"), an_image(), "cat", image_guidance_scale=2.5, **QUICK)
    assert apart(served("pix2pix", strength=1.0, image_guidance_scale=2.5), own) == 0
    (plain,) = image_to_image(shared("sd1"), an_image(), "cat", strength=0.75, **QUICK)
    assert apart(served("sd1", strength=0.75, image_guidance_scale=2.5), plain) == 0
