"""Making an image larger by a network that was trained for it (see `latentdiff.networks.upscaling`), and finer by a model."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Unpack

from PIL import Image

from latentdiff.errors import UsageError
from latentdiff.networks.device import describe_device
from latentdiff.networks.upscaling.model import TILE, Upscaler
from latentdiff.pipeline import Pipeline
from latentdiff.recipe import JSON_CHUNK, Recipe, library_versions
from latentdiff.request.calls import public
from latentdiff.request.domains import Real, Whole
from latentdiff.request.options import SamplingOptions
from latentdiff.request.plan import Plan, Sampling
from latentdiff.request.sources import ImageInput, Source, open_source
from latentdiff.tasks.editing import begin_at, walked, with_recipes
from latentdiff.tasks.sources import file_of, sampling_of
from latentdiff.tasks.transparency import finished

TASK = "upscale"
STRENGTH = 0.3
SMALLEST = 32  # pixels of a tile of the VAE
# Fields that recipes have to have.
UNUSED: dict[str, Any] = {"steps": 0, "guidance_scale": 1.0, "sampler": "", "seed": 0}


@dataclass(frozen=True, kw_only=True)
class UpscaleSettings:
    """What a recipe holds of an enlarging; without a strength no model went over it."""

    tile: int
    strength: float | None = None


@public(SamplingOptions, tile=Whole(1), strength=Real(0, 1))
def upscale(
    image: ImageInput,
    model: Upscaler | str | os.PathLike[str],
    *,
    tile: int = TILE,
    device: str = "auto",
    pipe: Pipeline | None = None,
    prompt: str | None = None,
    strength: float | None = None,
    **options: Unpack[SamplingOptions],
) -> Image.Image:
    """Make an image larger, by as much as the upscaler was trained for.

    Memory beside the image and the result depends on the tile alone. With a model, it then adds what the image lacks:
    image to image in windows and tiles of the size of its training.

    Args:
        image: any image of Pillow, or a file; it is turned upright by its EXIF entry, brought to sRGB and 8 bits, and seen on
            white.
        model: an upscaler of the ESRGAN family, `.safetensors` or `.pth`, or what `Upscaler.load` made of it.
        tile: side in pixels of what the network sees at once, 128 or more.
        device: where it computes, if `model` is a file.
        pipe: a text-to-image model that goes over the enlarged image.
        prompt: what the image shows, for `pipe`; None is nothing.
        strength: 0 to 1, how far `pipe` goes; None is 0.3.
        options: of `pipe`, for one image; see `SamplingOptions`. `window` and `vae_tile` are those of the training.

    Returns:
        RGB, or RGBA with the image's own transparency, with its recipe in `image.info`.

    Raises:
        UsageError: a tile that is too small, or something is said to a model that there is not.
        DataError: the image is missing or no image.
        CheckpointError: the upscaler is missing, damaged or something else.
        MissingDependencyError: spandrel is not installed.
        NotFiniteError: the upscaler gives NaN or infinity.
    """
    asked = {**options, "prompt": prompt, "strength": strength}
    if pipe is None and (said := [name for name, value in asked.items() if value is not None]):
        raise UsageError(f"expected pipe, the model that goes over the image, with {said[0]}; found none")
    if options.get("num_images") not in (None, 1):
        raise UsageError(f"expected one image to be made larger, found num_images {options['num_images']}")
    plan = None if pipe is None else _plan(pipe, prompt or "", STRENGTH if strength is None else strength, options)
    source = open_source(image)
    upscaler = model if isinstance(model, Upscaler) else Upscaler.load(model, device=device)
    colours = source.colours()
    large = upscaler(colours.on("white"), tile=tile)
    if pipe and plan:
        result = finished(walked(pipe, large, plan)[0] if plan.steps else large, colours)
        settings = UpscaleSettings(tile=tile, strength=STRENGTH if strength is None else strength)
        entries = {"image": source.entry, "upscaler": upscaler.entry}
        return with_recipes(pipe, [result], plan, TASK, asdict(settings), entries)[0]
    result = finished(large, colours)
    recipe = _recipe(upscaler, source, result, UpscaleSettings(tile=tile))
    kept = {name: result.info[name] for name in ("icc_profile",) if name in result.info}
    result.info = {**kept, JSON_CHUNK: recipe.to_json()}
    return result


def again(pipe: Pipeline | None, recipe: Recipe, sources: Mapping[str, Path]) -> Image.Image:
    """The image of a recipe once more."""
    settings = recipe.settings_as(UpscaleSettings)
    files = file_of(sources, "image"), file_of(sources, "upscaler")
    if pipe is None:
        return upscale(*files, tile=settings.tile)
    walk = {"strength": settings.strength, "prompt": recipe.prompt, **sampling_of(recipe, sources)}
    return upscale(*files, tile=settings.tile, device=str(pipe.device), pipe=pipe, **walk)


def _plan(pipe: Pipeline, prompt: str, strength: float, options: SamplingOptions) -> Plan:
    """The walk of a model over an enlarged image."""
    pipe.check_text_to_image()
    side = min(pipe.default_size)
    asked: SamplingOptions = {**options}
    asked["window"] = options.get("window") or side
    asked["vae_tile"] = options.get("vae_tile") or max(side, SMALLEST)
    return begin_at(Sampling(**asked).plan(prompt, pipe.schedule), strength)


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
