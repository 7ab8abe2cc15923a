"""Variations of an image by an unCLIP model (Ramesh et al. 2022): it is told what CLIP sees in it, under noise or not."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Unpack, cast

import torch
from PIL import Image
from torch import Tensor

from latentdiff.adapters.control.seen import adopted, clip_pixels
from latentdiff.diffusion.latents import NoiseStream
from latentdiff.errors import UsageError
from latentdiff.image import to_pil
from latentdiff.model.memory.sharing import one_use
from latentdiff.networks.device import finite_or_float32
from latentdiff.networks.image_encoder import ImageEncoder
from latentdiff.networks.inputs import VARIATIONS
from latentdiff.networks.layers import sinusoidal_embedding
from latentdiff.networks.sizes import Told
from latentdiff.networks.vae import latent_shape
from latentdiff.pipeline import Pipeline
from latentdiff.recipe import Recipe
from latentdiff.request.calls import public
from latentdiff.request.options import SamplingOptions, SizedOptions
from latentdiff.request.plan import Sampling, Start
from latentdiff.request.sources import ImageInput, open_source
from latentdiff.request.task_options import VARY
from latentdiff.tasks.editing import with_recipes
from latentdiff.tasks.sources import file_of, sampling_of

TASK = "vary"


@dataclass(frozen=True, kw_only=True)
class VarySettings:
    """What a recipe holds of variations besides the sampling."""

    noise_level: int


@public(SizedOptions, **VARY)
@one_use()
@torch.no_grad()
def vary(
    pipe: Pipeline,
    image: ImageInput,
    prompt: str | Sequence[str] = "",
    *,
    noise_level: int = 0,
    **options: Unpack[SizedOptions],
) -> list[Image.Image]:
    """Make new images that show what an image shows.

    Args:
        pipe: an unCLIP model, as those of SD 2.1.
        image: any image of Pillow, or a file, as `image_to_image` takes it. The middle square is seen.
        prompt: what the images shall show besides; it may be empty.
        noise_level: 0 to 999, a timestep: how much noise what CLIP sees is under. More lets the images differ more.
        options: see `SizedOptions`.

    Returns:
        RGB images with their recipe in `image.info`.

    Raises:
        UsageError: the model is of another kind, or an argument outside its domain.
        DataError: the file is missing or no image.
        NotFiniteError: the model gives NaN or infinity.
        Cancelled: the callback returned False.
    """
    if pipe.inputs != VARIATIONS or pipe.images is None or pipe.augmentation is None:
        raise UsageError(
            f"expected an unCLIP model, which is told what an image shows, found one for {pipe.inputs}; to change an image "
            "with it, use edit"
        )
    if noise_level and not pipe.images.is_known:
        warnings.warn(
            "the model's file does not hold the mean and deviation of its embeddings, as that with ViT-L; noise acts on them "
            "otherwise than in the model's folder",
            stacklevel=2,
        )
    source = open_source(image)
    size = options.pop("height", None), options.pop("width", None)
    plan = Sampling(**cast(SamplingOptions, options)).plan(prompt, pipe.schedule)
    shape = latent_shape(size, pipe.default_size, pipe.vae.config, None, len(plan.prompts))
    embedding = _embedded(pipe, source.opaque())  # (1, D)
    mean, deviation = (values.to(embedding) for values in (pipe.images.mean, pipe.images.deviation))
    level = pipe.augmentation.level(noise_level)
    label = sinusoidal_embedding(torch.tensor([float(noise_level)]), embedding.shape[1]).to(embedding)

    def start(part: slice, noise: NoiseStream) -> Start:
        drawn = noise.first((embedding.shape[1],))  # (N, D); the order of draws is that of diffusers
        noised = (level.alpha * (embedding - mean) / deviation + level.sigma * drawn) * deviation + mean
        told = torch.cat([noised, label.expand(len(noised), -1)], dim=1)  # (N, 2 D)
        return Start(plan.start_scale * noise(), told=Told(told, torch.zeros_like(told[:1])))

    images = to_pil(pipe.decode(pipe.sample(plan, shape, start), tile=plan.options.vae_tile))
    settings = VarySettings(noise_level=noise_level)
    return with_recipes(pipe, images, plan, TASK, asdict(settings), {"image": source.entry})


def again(pipe: Pipeline, recipe: Recipe, sources: Mapping[str, Path]) -> Image.Image:
    """The image of a recipe once more."""
    settings = recipe.settings_as(VarySettings)
    size = {"width": recipe.width, "height": recipe.height}
    image = file_of(sources, "image")
    return vary(pipe, image, recipe.prompt, **asdict(settings), **size, **sampling_of(recipe, sources))[0]


def _embedded(pipe: Pipeline, image: Image.Image) -> Tensor:
    """What CLIP sees in an image, (1, D), float32. The encoder's memory is given back."""
    assert pipe.images is not None
    weights = pipe.images.encoder
    part = adopted(weights, pipe.residence, pipe.precision.unet)
    encoder = part.ready()
    assert isinstance(encoder, ImageEncoder)
    pixels = clip_pixels([image], weights.config.image_size)
    found = finite_or_float32("the image encoder", encoder, lambda now: encoder(pixels.to(part.device, now)))
    part.give_back()
    return found.float()
