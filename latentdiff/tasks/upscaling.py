"""Making an image larger by a network that was trained for it; see `latentdiff.upscaling`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from PIL import Image

from latentdiff.device import describe_device
from latentdiff.pipeline import Pipeline
from latentdiff.recipe import JSON_CHUNK, Recipe, library_versions
from latentdiff.request.calls import public
from latentdiff.request.domains import Whole
from latentdiff.request.sources import ImageInput, Source, open_source
from latentdiff.tasks.sources import file_of
from latentdiff.tasks.transparency import finished
from latentdiff.upscaling.model import TILE, Upscaler

TASK = "upscale"
# Fields that recipes have to have.
UNUSED: dict[str, Any] = {"steps": 0, "guidance_scale": 1.0, "sampler": "", "seed": 0}


@dataclass(frozen=True, kw_only=True)
class UpscaleSettings:
    """What a recipe holds of an enlarging."""

    tile: int


@public(tile=Whole(1))
def upscale(
    image: ImageInput,
    model: Upscaler | str | os.PathLike[str],
    *,
    tile: int = TILE,
    device: str = "auto",
) -> Image.Image:
    """Make an image larger, by as much as the upscaler was trained for.

    Memory beside the image and the result depends on the tile alone.

    Args:
        image: any image of Pillow, or a file; it is turned upright by its EXIF entry, brought to sRGB and 8 bits, and seen on
            white.
        model: an upscaler of the ESRGAN family, `.safetensors` or `.pth`, or what `Upscaler.load` made of it.
        tile: side in pixels of what the network sees at once, 128 or more.
        device: where it computes, if `model` is a file.

    Returns:
        RGB, or RGBA with the image's own transparency, with its recipe in `image.info`.

    Raises:
        UsageError: a tile that is too small.
        DataError: the image is missing or no image.
        CheckpointError: the upscaler is missing, damaged or something else.
        MissingDependencyError: spandrel is not installed.
        NotFiniteError: the upscaler gives NaN or infinity.
    """
    source = open_source(image)
    upscaler = model if isinstance(model, Upscaler) else Upscaler.load(model, device=device)
    colours = source.colours()
    result = finished(upscaler(colours.on("white"), tile=tile), colours)
    recipe = _recipe(upscaler, source, result, UpscaleSettings(tile=tile))
    kept = {name: result.info[name] for name in ("icc_profile",) if name in result.info}
    result.info = {**kept, JSON_CHUNK: recipe.to_json()}
    return result


def again(pipe: Pipeline | None, recipe: Recipe, sources: Mapping[str, Path]) -> Image.Image:
    """The image of a recipe once more."""
    settings = asdict(recipe.settings_as(UpscaleSettings))
    return upscale(file_of(sources, "image"), file_of(sources, "upscaler"), **settings)


def _recipe(upscaler: Upscaler, source: Source, result: Image.Image, settings: UpscaleSettings) -> Recipe:
    return Recipe(
        prompt="",
        **UNUSED,
        width=result.width,
        height=result.height,
        device=describe_device(upscaler.device),
        versions={**library_versions(), "spandrel": version("spandrel")},
        task=TASK,
        task_settings=asdict(settings),
        sources={"image": source.entry, "upscaler": upscaler.entry},
    )
