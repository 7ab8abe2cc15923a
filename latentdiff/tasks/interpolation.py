"""Interpolation: a way of images from one prompt to the next, through start noise and text embeddings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Unpack

import torch
from PIL import Image
from torch import Tensor

from latentdiff.diffusion.latents import NoiseStream, start_noise
from latentdiff.errors import UsageError
from latentdiff.image import gif_of, to_pil
from latentdiff.model.memory.sharing import one_use
from latentdiff.networks.vae import latent_shape
from latentdiff.pipeline import Pipeline
from latentdiff.recipe import Recipe, read_recipe
from latentdiff.request.calls import public
from latentdiff.request.options import SamplingOptions
from latentdiff.request.plan import Sampling, Start, seed_of_each
from latentdiff.request.task_options import INTERPOLATE
from latentdiff.tasks.sources import sampling_of

TASK = "interpolate"
SLOWEST, FASTEST = 0.1, 50.0  # frames per second
NEARLY_PARALLEL = 1e-4  # radians; below, the arc is a line


@dataclass(frozen=True, kw_only=True)
class InterpolateSettings:
    """What a recipe holds of a frame, or of an animation of all of them, besides the sampling: the way, and the place
    on it."""

    prompts: list[str]
    seeds: list[int]  # one per prompt
    frames: int
    frame: int | None  # from 0; None is all of them
    fps: float | None = None  # of an animation


@public(SamplingOptions, **INTERPOLATE)
@one_use()
def interpolate(
    pipe: Pipeline,
    prompts: Sequence[str],
    *,
    frames: int = 24,
    same_noise: bool = False,
    width: int | None = None,
    height: int | None = None,
    **options: Unpack[SamplingOptions],
) -> list[Image.Image]:
    """Images on the way from the first prompt over all others to the last.

    The embeddings of neighbouring prompts are mixed linearly, and their start noise on the sphere, which keeps its
    norm. Each frame depends on its place alone, so frames agree whatever the batch size.

    Args:
        prompts: two or more; the first and the last frame are those of the first and the last prompt.
        frames: images in all, 2 or more, at equal distances.
        same_noise: give all prompts the start noise of the first, so that only the text changes.
        width: in pixels, a multiple of the VAE's factor (8); None is that of the training.
        height: likewise.
        options: see `SamplingOptions`; prompt i has seed + i, or the i-th of a list of seeds. `num_images` is 1.

    Returns:
        The frames in order, with their recipe in `image.info`.

    Raises:
        UsageError: an argument outside its domain.
        NotFiniteError: the model gives NaN or infinity.
        Cancelled: the callback returned False.
    """
    if isinstance(prompts, str) or len(prompts) < 2:
        raise UsageError(
            f"expected two prompts or more to go between, found {1 if isinstance(prompts, str) else len(prompts)}"
        )
    sampling = Sampling(**options)
    if sampling.num_images != 1:
        raise UsageError(
            f"expected num_images 1, found {sampling.num_images}: an interpolation makes one image per frame"
        )
    seeds = seed_of_each(sampling.seed, len(prompts))
    seeds = [seeds[0]] * len(seeds) if same_noise else seeds
    ways = [InterpolateSettings(prompts=list(prompts), seeds=seeds, frames=frames, frame=i) for i in range(frames)]
    return _frames(pipe, ways, sampling, (height, width))


def animation(frames: Sequence[Image.Image], fps: float, *, metadata: bool = True) -> bytes:
    """The frames of one way as a GIF; its comment is the recipe of them all, from which `reproduce` makes it again.

    Args:
        fps: frames per second, 0.1 to 50, which is about what players can do.
        metadata: whether to write the recipe.

    Raises:
        UsageError: a speed outside.
    """
    if not SLOWEST <= fps <= FASTEST:
        raise UsageError(f"expected {SLOWEST:g} to {FASTEST:g} frames per second, found {fps:g}")
    if not metadata:
        return gif_of(frames, fps)
    first = read_recipe(frames[0].info)
    recipe = replace(first, task_settings={**first.task_settings, "frame": None, "fps": fps})
    return gif_of(frames, fps, recipe.to_json())


def again(pipe: Pipeline, recipe: Recipe, sources: Mapping[str, Path]) -> Image.Image | bytes:
    """The frame of a recipe once more, or the animation.

    Raises:
        UsageError: the place is not on the way.
    """
    way = recipe.settings_as(InterpolateSettings)
    whole = way.frame is None and way.fps is not None
    if not (whole or 0 <= (-1 if way.frame is None else way.frame) < way.frames) or not 2 <= len(way.prompts) == len(
        way.seeds
    ):
        raise UsageError(
            f"expected a frame on the way between prompts with their seeds, or all and their speed, found {way}"
        )
    ways = [replace(way, frame=i, fps=None) for i in range(way.frames)] if whole else [way]
    frames = _frames(pipe, ways, Sampling(**sampling_of(recipe, sources)), (recipe.height, recipe.width))
    return animation(frames, way.fps) if way.frame is None and way.fps is not None else frames[0]


def slerp(first: Tensor, second: Tensor, share: float) -> Tensor:
    """Spherical interpolation of tensors of one shape (Shoemake 1985): `share` 0 is the first, 1 the second.

    The direction turns evenly and the length goes evenly from one to the other, so what is between normal noise is as
    long as normal noise; a linear mix would be shorter.
    """
    a, b = first.double(), second.double()
    lengths = a.norm(), b.norm()
    a, b = a / lengths[0], b / lengths[1]
    angle = torch.acos((a * b).sum().clamp(-1.0, 1.0))
    if angle < NEARLY_PARALLEL:
        return torch.lerp(first, second, share)
    direction = (torch.sin((1.0 - share) * angle) * a + torch.sin(share * angle) * b) / torch.sin(angle)
    return (direction * torch.lerp(*lengths, share)).to(first.dtype)


@torch.no_grad()
def _frames(
    pipe: Pipeline, ways: list[InterpolateSettings], sampling: Sampling, size: tuple[int | None, int | None]
) -> list[Image.Image]:
    """Frames of one way."""
    pipe.check_text_to_image()
    prompts, seeds = ways[0].prompts, ways[0].seeds
    plan = sampling.but(seed=[seeds[0]] * len(ways)).plan([" -> ".join(prompts)] * len(ways), pipe.schedule)
    shape = latent_shape(size, pipe.default_size, pipe.vae.config, None, len(ways))
    places = [(way.frame or 0) / (way.frames - 1) * (len(prompts) - 1) for way in ways]
    legs = [(min(int(place), len(prompts) - 2), place) for place in places]
    noises, texts = start_noise(seeds, shape, rule=plan.noise), pipe.encode(prompts, plan.reading)
    x = torch.stack([slerp(noises[leg], noises[leg + 1], place - leg) for leg, place in legs]).to(
        pipe.device
    )  # (N, C, h, w)
    positive = torch.stack([torch.lerp(texts[leg], texts[leg + 1], place - leg) for leg, place in legs])  # (N, L, C)

    def start(part: slice, noise: NoiseStream) -> Start:
        noise()  # what stochastic steps draw comes after the start noise, as everywhere
        return Start(plan.start_scale * x[part])

    latents = pipe.sample(plan, shape, start, text=(positive, pipe.encode(plan.negatives, plan.reading, negative=True)))
    images = to_pil(pipe.decode(latents, tile=plan.options.vae_tile))
    for image, fields, way in zip(images, plan.recipe_fields(), ways, strict=True):
        recipe = pipe.recipe(**fields, width=image.width, height=image.height, task=TASK, task_settings=asdict(way))
        image.info = {**recipe.to_chunks()}
    return images
