"""Inpainting: paint the part of an image that a mask shows, and leave the rest to the last bit.

With an ordinary model, the known part of the latents is put back at every step, noised to its level (Avrahami et al.
2023, "Blended Latent Diffusion"; Lugmayr et al. 2022, "RePaint", who also take each step several times over). A model
for inpainting sees the mask and the image without the masked part instead (Rombach et al. 2022, section 4.5).
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Unpack

import numpy as np
from PIL import Image

from latentdiff.errors import UsageError
from latentdiff.model.memory.sharing import one_use
from latentdiff.networks.inputs import INPAINTING
from latentdiff.pipeline import Pipeline
from latentdiff.recipe import Recipe
from latentdiff.request.calls import public
from latentdiff.request.options import SamplingOptions
from latentdiff.request.plan import Plan, Sampling
from latentdiff.request.sources import ImageInput, open_source
from latentdiff.request.task_options import INPAINT
from latentdiff.tasks.editing import begin_at, following, with_recipes
from latentdiff.tasks.inpainting_walk import painted, repeated
from latentdiff.tasks.inversion.artefact import Inversion, given_inversion
from latentdiff.tasks.inversion.run import invert
from latentdiff.tasks.masks import Box, composed, filled, prepared_mask, read_mask, surroundings
from latentdiff.tasks.soft_inpainting import ramped
from latentdiff.tasks.sources import file_of, sampling_of, warn_if_large
from latentdiff.tasks.transparency import Margins, finished

TASK = "inpaint"
# Where something is removed, the walk begins from its surroundings at this strength: from more noise than that, models
# make something new of it.
REMOVAL_STRENGTH = 0.5
PADDING_SHARE = 16  # of the side of the training's images


@dataclass(frozen=True, kw_only=True)
class InpaintSettings:
    """What a recipe holds of an inpainting besides the sampling; lengths in pixels.

    inversion: the arguments of `invert` by which the trajectory was found, if it was given in memory.
    """

    strength: float
    grow: int = 0
    blur: float = 0.0
    only_masked: bool = False
    padding: int = 32
    extend: Margins = (0, 0, 0, 0)
    repeats: int = 1
    soft: bool = False
    remove: bool = False
    invert_mask: bool = False
    inversion: dict[str, Any] | None = None


@public(SamplingOptions, **INPAINT)
@one_use()
def inpaint(
    pipe: Pipeline,
    image: ImageInput,
    mask: ImageInput | None,
    prompt: str | Sequence[str],
    *,
    inversion: Inversion | str | os.PathLike[str] | None = None,
    remove: bool = False,
    invert_mask: bool = False,
    strength: float | None = None,
    grow: int = 0,
    blur: float = 0.0,
    only_masked: bool = False,
    padding: int | None = None,
    extend: Margins = (0, 0, 0, 0),
    repeats: int = 1,
    soft: bool = False,
    **options: Unpack[SamplingOptions],
) -> list[Image.Image]:
    """Paint what the prompt says into the masked part of an image.

    Where the mask, once grown and blurred, is black, the result is the image to the last bit, as transparent as it was;
    where it is white, it is opaque. Grey mixes the two. A
    mask that is white all over repaints the whole image. In latents, a cell with any pixel to be painted is
    painted.

    Args:
        image: any image of Pillow, or a file; it is turned upright by its EXIF entry, brought to sRGB, and seen on white.
            Sides that are no multiples of the VAE's factor (8) are extended by their last pixels and cut again at the
            end.
        mask: of the image's size, white where to paint, or transparent there; see `masks.read_mask`. None with
            `extend` alone.
        prompt: what shall be there; with `only_masked` of the masked part alone.
        inversion: of this image: the masked part begins on its trajectory in place of from noise, and the rest stays
            on it, so that what is painted keeps the layout of what was there. The steps, by default all of its own,
            have to be among its noise levels. Not with `remove`, `only_masked` and `extend`, which paint on another
            image than its own.
        remove: take away what the mask covers: it is filled smoothly from around before anything else, and the model
            mends that. The prompt, which may be empty, says what is behind it.
        invert_mask: paint what the mask keeps, and keep what it paints.
        strength: 0 to 1; 1 paints from pure noise, less keeps something of what was there, or of the fill, 0 gives the
            image back as it is, or filled. None is 1, and 0.5 to remove.
        grow: pixels by which the mask is widened.
        blur: standard deviation in pixels of the blur that then softens its edge.
        only_masked: cut the masked part out with `padding` pixels around it, paint it at the size of the training's
            images, and put it back. For details of large images, and for things as large as the mask. None as
            padding is 1/16 of the side of the training's images: 32 for 512.
        extend: outpainting: pixels to add on the left, top, right and bottom, and to paint.
        repeats: how often each step is taken, with the noise put back in between, so that the painted part fits the
            kept one better (Lugmayr et al. 2022, section 4.2). The cost grows with it.
        soft: grey says how far a place may go from the image, as a strength of its own: it is held until that share of
            the steps is left (Levin & Fried 2023). Not with an inversion, nor with a model for inpainting.
        options: see `SamplingOptions`: negative_prompt, steps, guidance_scale, sampler, seed, num_images, ...

    Returns:
        Images with their recipe in `image.info`: RGB, or RGBA if the image has transparent parts.

    Raises:
        UsageError: an argument outside its domain; a mask of another size or without anything to paint; an inversion of
            another image.
        DataError: a file is missing or no image.
        CheckpointError: the inversion was made with another model.
        NotFiniteError: the model gives NaN or infinity.
        Cancelled: the callback returned False.
    """
    pipe.check_text_to_image(INPAINTING)
    if strength is None:
        strength = REMOVAL_STRENGTH if remove else 1.0
    settings = InpaintSettings(
        remove=remove,
        invert_mask=invert_mask,
        strength=strength,
        grow=grow,
        blur=blur,
        only_masked=only_masked,
        padding=round(min(pipe.default_size) / PADDING_SHARE) if padding is None else padding,
        extend=extend,
        repeats=repeats,
        soft=soft,
    )
    if soft and (inversion is not None or pipe.is_for_inpainting):
        raise UsageError(
            "expected no inversion and no model for inpainting with soft, which holds the image in place between the steps"
        )
    source = open_source(image)
    sources = {"image": source.entry}
    found = None
    if inversion is not None:
        found, settings, described = _given(pipe, inversion, settings)
        options, sources = following(options, found), described | sources
    plan = repeated(begin_at(Sampling(**options).plan(prompt, pipe.schedule), strength), repeats)
    colours = source.colours()
    wanted = None
    if mask is not None:
        given = open_source(mask)
        name = f"the mask {given.entry['file']}".strip()
        wanted, sources["mask"] = read_mask(given.image, name, invert=invert_mask), given.entry
    base, area = canvas(colours.on("white"), wanted, settings)
    if remove:
        base = composed(base, filled(base, area), area)
    if not plan.steps:
        images = [base.copy() for _ in plan.prompts]
    elif only_masked:
        images = _paint_cutout(pipe, base, area, plan, settings)
    else:
        warn_if_large(pipe, base, "paint only the masked part (only_masked, --only-masked)")
        done = painted(pipe, base, area, plan, from_noise=strength == 1.0, inversion=found, soft=soft)
        area = ramped(area) if soft else area
        images = [composed(base, one, area) for one in done]
    images = [finished(image, colours, area, extend) for image in images]
    return with_recipes(pipe, images, plan, TASK, asdict(settings), sources)


def again(pipe: Pipeline, recipe: Recipe, sources: Mapping[str, Path]) -> Image.Image:
    """The image of a recipe once more."""
    settings = asdict(recipe.settings_as(InpaintSettings))
    image = file_of(sources, "image")
    inversion, inverting = sources.get("inversion"), settings.pop("inversion")
    if inverting is not None:
        inversion = invert(pipe, image, measure=False, progress=False, **inverting)
    options: dict[str, Any] = {**settings, **sampling_of(recipe, sources), "inversion": inversion}
    return inpaint(pipe, image, sources.get("mask"), recipe.prompt, **options)[0]


def _given(
    pipe: Pipeline, inversion: Inversion | str | os.PathLike[str], settings: InpaintSettings
) -> tuple[Inversion, InpaintSettings, dict[str, dict[str, str]]]:
    """The inversion to paint from, and what the recipe says of it.

    Raises:
        UsageError: it cannot be that of the image painted on.
    """
    if settings.remove or settings.only_masked or any(settings.extend):
        raise UsageError(
            "expected no inversion with remove, only_masked or extend: they paint on another image than its own"
        )
    given = given_inversion(inversion)
    if not isinstance(given, tuple):
        raise UsageError(f"expected an inversion, which `latentdiff invert` makes, found {inversion}")
    found, described = given
    found.check_model(pipe.model_hash)
    if "image" in described:
        settings = replace(settings, inversion={"prompt": found.prompt, **found.settings})
    return found, settings, described


def canvas(image: Image.Image, mask: Image.Image | None, settings: InpaintSettings) -> tuple[Image.Image, Image.Image]:
    """The image with its margins, and the mask of what is to be painted, of the same size.

    The margins repeat the image's border until they are painted, so that what is noised there resembles it.

    Raises:
        UsageError: neither a mask nor margins, or a mask that does not fit.
    """
    margins = settings.extend
    if len(margins) != 4 or min(margins) < 0:
        raise UsageError(f"expected four margins of 0 or more pixels, left, top, right and bottom, found {margins}")
    if settings.padding < 0:
        raise UsageError(f"expected a padding of 0 or more pixels, found {settings.padding}")
    if mask is None and not any(margins):
        raise UsageError("expected a mask, or margins to extend the image by; found neither")
    left, top, right, bottom = margins
    around = ((top, bottom), (left, right))
    if mask is None:
        inner = np.zeros((image.height, image.width), np.uint8)
    else:
        inner = np.asarray(prepared_mask(mask, image.size, grow=0, blur=0.0))
        if inner.min() == 255:
            warnings.warn(
                "the mask is white all over, so the whole image is repainted; was it to be inverted (invert_mask, "
                "--invert-mask)?",
                stacklevel=2,
            )
    area = Image.fromarray(np.pad(inner, around, constant_values=255))
    area = prepared_mask(area, area.size, grow=settings.grow, blur=settings.blur)
    if not any(margins):
        return image, area
    return Image.fromarray(np.pad(np.asarray(image), (*around, (0, 0)), mode="edge")), area


def _paint_cutout(
    pipe: Pipeline, image: Image.Image, mask: Image.Image, plan: Plan, settings: InpaintSettings
) -> list[Image.Image]:
    box = surroundings(mask, settings.padding)
    size = _work_size(box, pipe)
    cutout = image.crop(box).resize(size, Image.Resampling.LANCZOS)
    area = mask.crop(box).resize(size, Image.Resampling.BILINEAR)  # which does not ring, as Lanczos does
    if plan.options.controls:
        controls = tuple(control.cropped(box, image.size, size) for control in plan.options.controls)
        plan = replace(plan, options=replace(plan.options, controls=controls))
    if plan.options.regions:
        regions = tuple(region.cropped(box, image.size) for region in plan.options.regions)
        plan = replace(plan, options=replace(plan.options, regions=regions))
    results = []
    done = painted(pipe, cutout, area, plan, from_noise=settings.strength == 1.0, soft=settings.soft)
    mask = ramped(mask) if settings.soft else mask
    for one in done:
        part = one.resize((box[2] - box[0], box[3] - box[1]), Image.Resampling.LANCZOS)
        result = image.copy()
        result.paste(composed(image.crop(box), part, mask.crop(box)), box)
        results.append(result)
    return results


def _work_size(box: Box, pipe: Pipeline) -> tuple[int, int]:
    """Width and height, multiples of the VAE's factor, with the box's proportions and the area of the training's
    images."""
    factor = pipe.vae.config.downscale
    height, width = pipe.default_size
    box_width, box_height = box[2] - box[0], box[3] - box[1]
    scale = math.sqrt(width * height / (box_width * box_height))
    wide, high = (factor * max(1, round(side * scale / factor)) for side in (box_width, box_height))
    return wide, high
