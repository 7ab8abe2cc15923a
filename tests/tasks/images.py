"""Images and masks to work on, and diffusers' way of working on them."""

from __future__ import annotations

from copy import copy

import numpy as np
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    UniPCMultistepScheduler,
)
from PIL import Image

from tests import peers

SCHEDULERS = {
    "ddim": (DDIMScheduler, "leading"),
    "ddpm": (DDPMScheduler, "leading"),
    "euler": (EulerDiscreteScheduler, "linspace"),
    "dpmpp-2m": (DPMSolverMultistepScheduler, "linspace"),
    "unipc": (UniPCMultistepScheduler, "linspace"),
}


def an_image(width: int = 64, height: int = 64, seed: int = 0) -> Image.Image:
    """Colours that run smoothly, with some grain."""
    down, right = np.meshgrid(np.linspace(0, 1, height), np.linspace(0, 1, width), indexing="ij")
    colours = np.stack([down, right, 1 - down * right], axis=-1) * 220
    grain = np.random.default_rng(seed).integers(0, 36, (height, width, 3))
    return Image.fromarray((colours + grain).astype(np.uint8))


def mask(box: tuple[int, int, int, int], width: int = 64, height: int = 64) -> Image.Image:
    """White inside the box (left, top, right, bottom), black outside."""
    image = Image.new("L", (width, height))
    image.paste(255, box)
    return image


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def apart(first: Image.Image, second: Image.Image | np.ndarray) -> int:
    """The largest difference in grey levels."""
    other = pixels(second) if isinstance(second, Image.Image) else second
    return int(np.abs(pixels(first) - other).max())


def diffusers_pipeline(kind: str, family: str, sampler: str):
    """ "edit" or "inpaint" in diffusers, or what a model is for ("own"), on one of the tiny models."""
    components = copy(peers.theirs(family).components)
    scheduler, spacing = SCHEDULERS[sampler]
    components["scheduler"] = scheduler.from_config(
        {**components["scheduler"].config, "timestep_spacing": spacing, "clip_sample": False}
    )
    if kind == "own":
        pipe = type(peers.theirs(family))(**components)
    elif family.startswith("xl"):
        pipeline = StableDiffusionXLInpaintPipeline if kind == "inpaint" else StableDiffusionXLImg2ImgPipeline
        pipe = pipeline(**components, add_watermarker=False)
    else:
        pipeline = StableDiffusionInpaintPipeline if kind == "inpaint" else StableDiffusionImg2ImgPipeline
        pipe = pipeline(**components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def in_diffusers(kind: str, family: str, sampler: str, seeds: list[int], **options) -> np.ndarray:
    """Images (N, H, W, 3) in grey levels, one per seed.

    Each is made alone: in a batch, the inpainting of diffusers draws the latents of the image from the first
    generator only.
    """
    pipe = diffusers_pipeline(kind, family, sampler)
    images = [pipe(generator=torch.Generator().manual_seed(seed), output_type="np", **options).images for seed in seeds]
    return (np.concatenate(images) * 255).round().astype(int)
