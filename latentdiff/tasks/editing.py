"""Image to image: noise a picture part of the way and denoise it under a prompt (SDEdit, Meng et al. 2022)."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from latentdiff.errors import UsageError
from latentdiff.image import as_rgb, to_pil, to_tensor
from latentdiff.latents import NoiseStream
from latentdiff.pipeline import Pipeline, Start
from latentdiff.recipe import Recipe
from latentdiff.request import Plan, Sampling
from latentdiff.tasks.sources import Picture, file_of, open_source

TASK = "edit"
# From this many times the area of the training's pictures on, a model's pictures fall apart into repetitions.
MUCH_LARGER = 4


@dataclass(frozen=True, kw_only=True)
class EditSettings:
    """What a recipe holds of an edit besides the sampling; sizes in pixels, as asked for."""

    strength: float
    width: int | None = None
    height: int | None = None


def image_to_image(
    pipe: Pipeline,
    image: Picture,
    prompt: str | Sequence[str],
    *,
    strength: float = 0.6,
    width: int | None = None,
    height: int | None = None,
    **options: Any,
) -> list[Image.Image]:
    """Change a picture towards a prompt.

    The picture is noised to the level where the last `int(steps * strength)` steps begin, and those are taken, as in
    diffusers' img2img; so the cost is `strength` times that of generating. With strength 0 it is given back as it is.

    Args:
        image: any picture of Pillow, or a file; it is turned upright by its EXIF entry, and transparency lies on white.
        strength: 0 to 1, how far to go from the picture.
        width, height: bring the picture to this size first; one alone keeps its proportions, None is its own size. Sides
            that are no multiples of the VAE's factor (8) are extended by their last pixels and cut again at the end.
        options: of `Sampling`: negative_prompt, steps, guidance_scale, sampler, seed, num_images, callback, ...

    Returns:
        RGB pictures of that size with their recipe in `image.info`.

    Raises:
        UsageError: an argument outside its domain.
        DataError: the file is missing or no picture.
        NotFiniteError: the model gives NaN or infinity.
        Cancelled: the callback returned False.
    """
    pipe.check_text_to_image()
    source = open_source(image)
    plan = begin_at(Sampling(**options).plan(prompt, pipe.schedule), strength)
    picture = resized(as_rgb(source.image), width, height)
    images = _walk(pipe, picture, plan) if plan.steps else [picture.copy() for _ in plan.prompts]
    settings = EditSettings(strength=strength, width=width, height=height)
    return with_recipes(pipe, images, plan, TASK, asdict(settings), {"image": source.entry})


def again(pipe: Pipeline, recipe: Recipe, sources: Mapping[str, Path]) -> Image.Image:
    """The picture of a recipe once more."""
    settings = recipe.settings_as(EditSettings)
    return image_to_image(pipe, file_of(sources, "image"), recipe.prompt, **asdict(settings), **recipe.sampling())[0]


def begin_at(plan: Plan, strength: float) -> Plan:
    """The plan cut to its last `int(steps * strength)` steps, as diffusers counts them.

    Raises:
        UsageError: a strength outside 0 to 1, or one so small that no step is left.
    """
    if not 0.0 <= strength <= 1.0:
        raise UsageError(f"expected a strength of 0 to 1, found {strength}")
    taken = min(int(plan.steps * strength), plan.steps)
    if strength and not taken:
        raise UsageError(
            f"expected a strength of at least 1 / steps, found {strength} with {plan.steps} steps, less than one step; "
            "raise one of the two"
        )
    return replace(plan, levels=plan.levels[plan.steps - taken :])


def resized(picture: Image.Image, width: int | None, height: int | None) -> Image.Image:
    """The picture at a size in pixels; one side alone keeps the proportions.

    Raises:
        UsageError: a side below 1.
    """
    for name, side in (("width", width), ("height", height)):
        if side is not None and side < 1:
            raise UsageError(f"expected a {name} of 1 or more, found {side}")
    if width is None and height is None:
        return picture
    width = width or max(1, round(picture.width * height / picture.height))
    height = height or max(1, round(picture.height * width / picture.width))
    return picture.resize((width, height), Image.Resampling.LANCZOS)


def extended(picture: Image.Image, factor: int) -> Image.Image:
    """The picture with its last column and row repeated until both sides are multiples of `factor`."""
    right, bottom = -picture.width % factor, -picture.height % factor
    if not right and not bottom:
        return picture
    return Image.fromarray(np.pad(np.asarray(picture), ((0, bottom), (0, right), (0, 0)), mode="edge"))


def warn_if_large(pipe: Pipeline, picture: Image.Image, remedy: str) -> None:
    """Say so if a picture is much larger than those that the model was trained on."""
    height, width = pipe.default_size
    if picture.width * picture.height > MUCH_LARGER * width * height:
        warnings.warn(
            f"the picture has {picture.width} x {picture.height} pixels and the model was trained on {width} x {height}; "
            f"{remedy}",
            stacklevel=3,
        )


def with_recipes(
    pipe: Pipeline,
    images: list[Image.Image],
    plan: Plan,
    task: str,
    settings: dict[str, Any],
    sources: dict[str, dict[str, str]],
) -> list[Image.Image]:
    """The pictures of a plan, each with its recipe and nothing else in `image.info`."""
    for image, fields in zip(images, plan.recipe_fields(), strict=True):
        size = {"width": image.width, "height": image.height}
        recipe = pipe.recipe(**fields, **size, task=task, task_settings=settings, sources=sources)
        image.info = dict(recipe.to_chunks())
    return images


def _walk(pipe: Pipeline, picture: Image.Image, plan: Plan) -> list[Image.Image]:
    warn_if_large(pipe, picture, "give a smaller width and height")
    encoded = pipe.encode_images(to_tensor([extended(picture, pipe.vae.config.downscale)]))
    first = plan.levels[0]

    def start(part: slice, noise: NoiseStream) -> Start:
        latents = encoded.sample(noise())  # (N, C, h, w); the order of draws is that of diffusers
        return Start(first.alpha * latents + first.sigma * noise())

    latents = pipe.sample(plan, tuple(encoded.mean.shape[1:]), start)
    return [image.crop((0, 0, *picture.size)) for image in to_pil(pipe.decode(latents))]
