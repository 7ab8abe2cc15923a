"""The images that a task starts from: their files, sizes and borders."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from latentdiff.adapters.control.image_prompts import image_prompts_again
from latentdiff.adapters.control.model import controls_again
from latentdiff.adapters.control.regions import regions_again
from latentdiff.errors import DataError, UsageError
from latentdiff.pipeline import Pipeline
from latentdiff.recipe import Recipe

# From this many times the area of the training's images on, a model's images fall apart into repetitions.
MUCH_LARGER = 4


def sampling_of(recipe: Recipe, sources: Mapping[str, Path]) -> dict[str, Any]:
    """The options that make the image of a recipe, its controls, image prompts and regions among them.

    Args:
        sources: by role, see `Recipe.roles`.
    """
    steering = {
        "controls": controls_again(recipe.controls, lambda role: file_of(sources, role)),
        "image_prompts": image_prompts_again(recipe.image_prompts, lambda role: file_of(sources, role)),
        "regions": regions_again(recipe.regions, lambda role: file_of(sources, role)),
    }
    return {**recipe.sampling(), **{name: things for name, things in steering.items() if things}}


def file_of(sources: Mapping[str, Path], role: str) -> Path:
    """The file of a role.

    Raises:
        DataError: the recipe does not name one.
    """
    if role not in sources:
        raise DataError(f"the image's recipe does not say what it was made from: it has no source {role!r}")
    return sources[role]


def resized(image: Image.Image, width: int | None, height: int | None) -> Image.Image:
    """The image at a size in pixels; one side alone keeps the proportions.

    Raises:
        UsageError: a side below 1.
    """
    for name, side in (("width", width), ("height", height)):
        if side is not None and side < 1:
            raise UsageError(f"expected a {name} of 1 or more, found {side}")
    if width is None and height is None:
        return image
    width = width or max(1, round(image.width * height / image.height))
    height = height or max(1, round(image.height * width / image.width))
    return image.resize((width, height), Image.Resampling.LANCZOS)


def warn_if_large(pipe: Pipeline, image: Image.Image, remedy: str) -> None:
    """Say so if an image is much larger than those that the model was trained on."""
    height, width = pipe.default_size
    if image.width * image.height > MUCH_LARGER * width * height:
        warnings.warn(
            f"the image has {image.width} x {image.height} pixels and the model was trained on {width} x {height}; "
            f"{remedy}",
            stacklevel=3,
        )
