"""ControlNets against diffusers' pipelines on the same random weights: one grey level at most."""

from __future__ import annotations

from copy import copy

import numpy as np
import pytest
import torch
from diffusers import (
    StableDiffusionControlNetImg2ImgPipeline,
    StableDiffusionControlNetInpaintPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionXLControlNetImg2ImgPipeline,
    StableDiffusionXLControlNetInpaintPipeline,
    StableDiffusionXLControlNetPipeline,
)

from latentdiff import ControlNet, image_to_image, inpaint
from tests import peers
from tests.adapters.control.nets import hint, saved, theirs
from tests.tasks.images import an_image, apart, mask

STEPS = {
    "controlnet_conditioning_scale": 1.0,
    "num_inference_steps": 4,
    "guidance_scale": 5.0,
    "negative_prompt": "red fox",
}
OURS = {"steps": 4, "guidance_scale": 5.0, "negative_prompt": "red fox", "sampler": "ddim", "progress": False}
KINDS = {
    "generate": StableDiffusionControlNetPipeline,
    "edit": StableDiffusionControlNetImg2ImgPipeline,
    "inpaint": StableDiffusionControlNetInpaintPipeline,
}
XL_KINDS = {
    "generate": StableDiffusionXLControlNetPipeline,
    "edit": StableDiffusionXLControlNetImg2ImgPipeline,
    "inpaint": StableDiffusionXLControlNetInpaintPipeline,
}


def in_diffusers(kind: str, family: str, nets: list, seed: int = 7, **options) -> np.ndarray:
    components = copy(peers.theirs(family).components)
    is_xl = family.startswith("xl")
    own = {"add_watermarker": False} if is_xl else {"requires_safety_checker": False}
    kinds = XL_KINDS if is_xl else KINDS
    pipe = kinds[kind](**components, controlnet=nets if len(nets) > 1 else nets[0], **own)
    pipe.set_progress_bar_config(disable=True)
    made = pipe(
        "a photo of the cat", generator=torch.Generator().manual_seed(seed), output_type="np", **{**STEPS, **options}
    )
    return (made.images[0] * 255).round().astype(int)


CASES = {
    "one": ("sd1", [{"scale": 0.8}], {"controlnet_conditioning_scale": 0.8}),
    "linear": ("sd2", [{}], {}),
    "xl": ("xl", [{"scale": 0.8}], {"controlnet_conditioning_scale": 0.8}),
    "xl, two": ("xl", [{"scale": 0.5}, {"scale": 1.3}], {"controlnet_conditioning_scale": [0.5, 1.3]}),
    "xl, guess": ("xl", [{"guess": True}], {"guess_mode": True}),
    "two": ("sd1", [{"scale": 0.5}, {"scale": 1.3}], {"controlnet_conditioning_scale": [0.5, 1.3]}),
    "part": ("sd1", [{"start": 0.25, "end": 0.7}], {"control_guidance_start": 0.25, "control_guidance_end": 0.7}),
    "guess": ("sd1", [{"guess": True}], {"guess_mode": True}),
    "two guesses": (
        "sd1", [{"guess": True}, {"guess": True, "end": 0.5}],
        {"guess_mode": True, "controlnet_conditioning_scale": [1.0, 1.0], "control_guidance_start": [0.0, 0.0],
         "control_guidance_end": [1.0, 0.5]},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_same_image_as_diffusers(case, tmp_path):
    family, settings, options = CASES[case]
    seeds = range(5, 5 + len(settings))
    images = [hint(seed) for seed in seeds]
    expected = in_diffusers(
        "generate",
        family,
        [theirs(family, seed) for seed in seeds],
        image=images if len(images) > 1 else images[0],
        **options,
    )
    controls = [
        ControlNet.load(saved(tmp_path, family, seed))(image, **own)
        for seed, image, own in zip(seeds, images, settings, strict=True)
    ]
    pipe = peers.ours(family)
    (image,) = pipe("a photo of the cat", controls=controls, seed=7, **OURS)
    assert apart(image, expected) <= 1
    assert apart(pipe("a photo of the cat", seed=7, **OURS)[0], expected) > 5


def test_pooled_outputs_are_those_of_diffusers(tmp_path):
    expected = in_diffusers("generate", "sd1", [theirs("sd1", 5, True)], image=hint())
    control = ControlNet.load(saved(tmp_path, pools=True))(hint())
    assert apart(peers.ours("sd1")("a photo of the cat", controls=[control], seed=7, **OURS)[0], expected) <= 1


@pytest.mark.parametrize("family", ["sd1", "xl"])
def test_image_to_image(family, tmp_path):
    expected = in_diffusers("edit", family, [theirs(family)], image=an_image(), control_image=hint(), strength=0.75)
    control = ControlNet.load(saved(tmp_path, family))(hint())
    (image,) = image_to_image(
        peers.ours(family), an_image(), "a photo of the cat", strength=0.75, controls=[control], seed=7, **OURS
    )
    assert apart(image, expected) <= 1


@pytest.mark.parametrize(("family", "of"), [("sd1", "sd1"), ("inpaint", "sd1"), ("xl", "xl"), ("xl-inpaint", "xl")])
def test_inpainting(family, of, tmp_path):
    """With an inpainting model, the control sees the latents alone."""
    box = (16, 8, 48, 40)
    expected = in_diffusers(
        "inpaint", family, [theirs(of)], image=an_image(), mask_image=mask(box), control_image=hint(), strength=1.0
    )
    control = ControlNet.load(saved(tmp_path, of))(hint())
    (image,) = inpaint(
        peers.ours(family), an_image(), mask(box), "a photo of the cat", controls=[control], seed=7, **OURS
    )
    inside = image.crop(box)
    assert apart(inside, expected[box[1] : box[3], box[0] : box[2]]) <= 1
