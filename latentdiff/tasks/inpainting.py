"""Inpainting: paint the part of a picture that a mask shows, and leave the rest to the last bit.

With an ordinary model, the known part of the latents is put back at every step, noised to its level (Avrahami et al. 2023,
"Blended Latent Diffusion"; Lugmayr et al. 2022, "RePaint", who also take each step several times over). A model for inpainting
sees the mask and the picture without the masked part instead (Rombach et al. 2022, section 4.5).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from latentdiff.denoise import Noise, Step
from latentdiff.errors import UsageError
from latentdiff.image import as_rgb, to_pil, to_tensor
from latentdiff.latents import NoiseStream
from latentdiff.parameterization import Denoiser
from latentdiff.pipeline import Pipeline, Start
from latentdiff.recipe import Recipe
from latentdiff.request import Plan, Sampling
from latentdiff.schedule import Level
from latentdiff.tasks.editing import begin_at, extended, warn_if_large, with_recipes
from latentdiff.tasks.masks import Box, composed, filled, latent_mask, prepared_mask, surroundings
from latentdiff.tasks.sources import Picture, file_of, open_source
from latentdiff.vae import LatentDistribution

TASK = "inpaint"
# Where something is removed, the walk begins from its surroundings at this strength: from more noise than that, models make
# something new of it.
REMOVAL_STRENGTH = 0.5
PADDING_SHARE = 16  # of the side of the training's pictures
Margins = tuple[int, int, int, int]


@dataclass(frozen=True, kw_only=True)
class InpaintSettings:
    """What a recipe holds of an inpainting besides the sampling; lengths in pixels."""

    strength: float
    grow: int = 0
    blur: float = 0.0
    only_masked: bool = False
    padding: int = 32
    extend: Margins = (0, 0, 0, 0)
    repeats: int = 1
    remove: bool = False


def inpaint(
    pipe: Pipeline,
    image: Picture,
    mask: Picture | None,
    prompt: str | Sequence[str],
    *,
    remove: bool = False,
    strength: float | None = None,
    grow: int = 0,
    blur: float = 0.0,
    only_masked: bool = False,
    padding: int | None = None,
    extend: Margins = (0, 0, 0, 0),
    repeats: int = 1,
    **options: Any,
) -> list[Image.Image]:
    """Paint what the prompt says into the masked part of a picture.

    Where the mask, once grown and blurred, is black, the result is the picture to the last bit. Grey mixes the two. A mask that
    is white all over paints the whole picture anew. In latents, a cell with any pixel to be painted is painted.

    Args:
        image: any picture of Pillow, or a file; it is turned upright by its EXIF entry, and transparency lies on white.
            Sides that are no multiples of the VAE's factor (8) are extended by their last pixels and cut again at the end.
        mask: of the picture's size, white where to paint; None with `extend` alone.
        prompt: what shall be there; with `only_masked` of the masked part alone.
        remove: take away what the mask covers: it is filled smoothly from around before anything else, and the model mends
            that. The prompt, which may be empty, says what is behind it.
        strength: 0 to 1; 1 paints from pure noise, less keeps something of what was there, or of the fill, 0 gives the picture
            back as it is, or filled. None is 1, and 0.5 to remove.
        grow, blur: pixels by which the mask is widened, and the standard deviation of the blur that then softens its edge.
        only_masked: cut the masked part out with `padding` pixels around it, paint it at the size of the training's
            pictures, and put it back. For details of large pictures, and for things as large as the mask. None as padding is
            1/16 of the side of the training's pictures: 32 for 512.
        extend: outpainting: pixels to add on the left, top, right and bottom, and to paint.
        repeats: how often each step is taken, with the noise put back in between, so that the painted part fits the kept one
            better (Lugmayr et al. 2022, section 4.2). The cost grows with it.
        options: of `Sampling`: negative_prompt, steps, guidance_scale, sampler, seed, num_images, callback, ...

    Returns:
        RGB pictures with their recipe in `image.info`.

    Raises:
        UsageError: an argument outside its domain; a mask of another size or without anything to paint.
        DataError: a file is missing or no picture.
        NotFiniteError: the model gives NaN or infinity.
        Cancelled: the callback returned False.
    """
    if strength is None:
        strength = REMOVAL_STRENGTH if remove else 1.0
    settings = InpaintSettings(
        remove=remove,
        strength=strength,
        grow=grow,
        blur=blur,
        only_masked=only_masked,
        padding=round(min(pipe.default_size) / PADDING_SHARE) if padding is None else padding,
        extend=tuple(extend),
        repeats=repeats,
    )
    source = open_source(image)
    sources = {"image": source.entry}
    plan = repeated(begin_at(Sampling(**options).plan(prompt, pipe.schedule), strength), repeats)
    original = as_rgb(source.image)
    wanted = None
    if mask is not None:
        given = open_source(mask)
        wanted, sources["mask"] = given.image, given.entry
    picture, area = canvas(original, wanted, settings)
    if remove:
        picture = composed(picture, filled(picture, area), area)
    if not plan.steps:
        images = [picture.copy() for _ in plan.prompts]
    elif only_masked:
        images = _paint_cutout(pipe, picture, area, plan, settings)
    else:
        warn_if_large(pipe, picture, "paint only the masked part (only_masked, --only-masked)")
        images = [composed(picture, painted, area) for painted in _paint(pipe, picture, area, plan, settings)]
    return with_recipes(pipe, images, plan, TASK, asdict(settings), sources)


def again(pipe: Pipeline, recipe: Recipe, sources: Mapping[str, Path]) -> Image.Image:
    """The picture of a recipe once more."""
    settings = asdict(recipe.settings_as(InpaintSettings))
    return inpaint(pipe, file_of(sources, "image"), sources.get("mask"), recipe.prompt, **settings, **recipe.sampling())[0]


def repeated(plan: Plan, repeats: int) -> Plan:
    """The plan with each step taken `repeats` times, and a step back up in noise between them.

    Raises:
        UsageError: less than once.
    """
    if repeats < 1:
        raise UsageError(f"expected repeats of 1 or more, found {repeats}")
    if repeats == 1 or not plan.steps:
        return plan
    levels = [level for pair in pairwise(plan.levels) for level in pair * repeats]
    levels = [level for level, before in zip(levels, [None, *levels], strict=False) if level is not before]
    return replace(plan, levels=levels, sampler=replace(plan.sampler, step=partial(_down_or_up, plan.sampler.step)))


def _down_or_up(
    down: Step, denoiser: Denoiser, x: Tensor, level: Level, next_level: Level, state: Any, noise: Noise
) -> tuple[Tensor, Any]:
    """A sampler's step; where the next level is noisier, a draw from q(x_next | x), which ends a solver's history."""
    if next_level.alpha_cumprod > level.alpha_cumprod:
        return down(denoiser, x, level, next_level, state, noise)
    kept = next_level.alpha / level.alpha
    return kept * x + math.sqrt(1.0 - kept**2) * noise(), None


def canvas(picture: Image.Image, mask: Image.Image | None, settings: InpaintSettings) -> tuple[Image.Image, Image.Image]:
    """The picture with its margins, and the mask of what is to be painted, of the same size.

    The margins repeat the picture's border until they are painted, so that what is noised there resembles it.

    Raises:
        UsageError: neither a mask nor margins, or a mask that does not fit.
    """
    margins = settings.extend
    if len(margins) != 4 or min(margins) < 0:
        raise UsageError(f"expected four margins of 0 or more pixels, left, top, right and bottom, found {margins}")
    if settings.padding < 0:
        raise UsageError(f"expected a padding of 0 or more pixels, found {settings.padding}")
    if mask is None and not any(margins):
        raise UsageError("expected a mask, or margins to extend the picture by; found neither")
    left, top, right, bottom = margins
    around = ((top, bottom), (left, right))
    if mask is None:
        inner = np.zeros((picture.height, picture.width), np.uint8)
    else:
        inner = np.asarray(prepared_mask(mask, picture.size, grow=0, blur=0.0))
    area = Image.fromarray(np.pad(inner, around, constant_values=255))
    area = prepared_mask(area, area.size, grow=settings.grow, blur=settings.blur)
    if not any(margins):
        return picture, area
    return Image.fromarray(np.pad(np.asarray(picture), (*around, (0, 0)), mode="edge")), area


def _paint_cutout(
    pipe: Pipeline, picture: Image.Image, mask: Image.Image, plan: Plan, settings: InpaintSettings
) -> list[Image.Image]:
    box = surroundings(mask, settings.padding)
    size = _work_size(box, pipe)
    cutout = picture.crop(box).resize(size, Image.Resampling.LANCZOS)
    area = mask.crop(box).resize(size, Image.Resampling.BILINEAR)  # which does not ring, as Lanczos does
    results = []
    for painted in _paint(pipe, cutout, area, plan, settings):
        part = painted.resize((box[2] - box[0], box[3] - box[1]), Image.Resampling.LANCZOS)
        result = picture.copy()
        result.paste(composed(picture.crop(box), part, mask.crop(box)), box)
        results.append(result)
    return results


def _work_size(box: Box, pipe: Pipeline) -> tuple[int, int]:
    """Width and height, multiples of the VAE's factor, with the box's proportions and the area of the training's pictures."""
    factor = pipe.vae.config.downscale
    height, width = pipe.default_size
    box_width, box_height = box[2] - box[0], box[3] - box[1]
    scale = math.sqrt(width * height / (box_width * box_height))
    return tuple(factor * max(1, round(side * scale / factor)) for side in (box_width, box_height))


def _paint(pipe: Pipeline, picture: Image.Image, mask: Image.Image, plan: Plan, settings: InpaintSettings) -> list[Image.Image]:
    """The pictures as the VAE decodes them, kept parts too."""
    factor = pipe.vae.config.downscale
    encoded = pipe.encode_images(to_tensor([extended(picture, factor)]))
    cells = latent_mask(mask, factor).to(pipe.device)  # (1, 1, h, w)
    starts = _starts_with_extra_channels if pipe.is_for_inpainting else _starts_with_blending
    start = starts(pipe, picture, mask, cells, encoded, plan, from_noise=settings.strength == 1.0)
    latents = pipe.sample(plan, tuple(encoded.mean.shape[1:]), start)
    return [image.crop((0, 0, *picture.size)) for image in to_pil(pipe.decode(latents))]


def _starts_with_blending(
    pipe: Pipeline,
    picture: Image.Image,
    mask: Image.Image,
    cells: Tensor,
    encoded: LatentDistribution,
    plan: Plan,
    *,
    from_noise: bool,
) -> Callable[[slice, NoiseStream], Start]:
    """For an ordinary model: after each step, what is to be kept is put back, with the start noise at the level reached."""

    def start(part: slice, noise: NoiseStream) -> Start:
        latents = encoded.sample(noise())  # (N, C, h, w); the order of draws is that of diffusers
        eps = noise()

        def put_back(x: Tensor, level: Level) -> Tensor:
            known = latents if level.is_clean else level.alpha * latents + level.sigma * eps
            return cells * x + (1.0 - cells) * known

        return Start(_first_latents(plan, latents, eps, from_noise), after_step=put_back)

    return start


def _starts_with_extra_channels(
    pipe: Pipeline,
    picture: Image.Image,
    mask: Image.Image,
    cells: Tensor,
    encoded: LatentDistribution,
    plan: Plan,
    *,
    from_noise: bool,
) -> Callable[[slice, NoiseStream], Start]:
    """For an inpainting model, which was trained with masks of 0 and 1, and mid-grey in place of what they hide."""
    factor = pipe.vae.config.downscale
    visible = torch.from_numpy(np.asarray(mask) == 0)  # (H, W)
    right, bottom = -mask.width % factor, -mask.height % factor
    visible = F.pad(visible[None, None].float(), (0, right, 0, bottom), value=1.0)
    shown = pipe.encode_images(to_tensor([extended(picture, factor)]) * visible)

    def start(part: slice, noise: NoiseStream) -> Start:
        count = part.stop - part.start
        latents = None if from_noise else encoded.sample(noise())
        eps = noise()
        hidden = (cells > 0).to(eps).expand(count, -1, -1, -1)
        extra = torch.cat([hidden, shown.sample(noise())], dim=1)  # (N, 1 + C, h, w)
        return Start(_first_latents(plan, latents, eps, from_noise), extra_channels=extra)

    return start


def _first_latents(plan: Plan, latents: Tensor | None, eps: Tensor, from_noise: bool) -> Tensor:
    first = plan.levels[0]
    return plan.start_scale * eps if from_noise else first.alpha * latents + first.sigma * eps
