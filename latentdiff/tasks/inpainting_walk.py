"""The walk of an inpainting: where it begins, what holds the known part in place, and how often each step is taken."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from latentdiff.diffusion.latents import NoiseStream
from latentdiff.diffusion.samplers.restart import down_or_up
from latentdiff.diffusion.schedule import Level
from latentdiff.errors import UsageError
from latentdiff.image import to_pil, to_tensor
from latentdiff.networks.vae import LatentDistribution
from latentdiff.pipeline import Pipeline
from latentdiff.request.plan import Plan, Start
from latentdiff.request.sources import extended
from latentdiff.tasks.inversion.artefact import Inversion
from latentdiff.tasks.masks import latent_mask, mean_mask
from latentdiff.tasks.soft_inpainting import starts_softly

# How far, in units of their spread, the latents of an image may be from those that were inverted: for other
# precisions.
SAME_IMAGE = 0.2


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
    return replace(plan, levels=levels, sampler=replace(plan.sampler, step=partial(down_or_up, plan.sampler.step)))


def painted(
    pipe: Pipeline,
    image: Image.Image,
    mask: Image.Image,
    plan: Plan,
    *,
    from_noise: bool,
    inversion: Inversion | None = None,
    soft: bool = False,
) -> list[Image.Image]:
    """The images of a plan as the VAE decodes them, kept parts too.

    Args:
        mask: of the image's size, white where to paint.
        from_noise: paint from pure noise, else from the image at the first level.
        inversion: where to begin in place of both; see `inpaint`.
        soft: grey is how far a place may go; see `soft_inpainting`.
    """
    factor = pipe.vae.config.downscale
    encoded = pipe.encode_images(to_tensor([extended(image, factor)]), tile=plan.options.vae_tile)
    cells = latent_mask(mask, factor).to(pipe.device)  # (1, 1, h, w)
    if soft:
        start = starts_softly(mean_mask(mask, factor).to(pipe.device), encoded, plan, from_noise=from_noise)
    elif inversion is not None:
        start = starts_on_trajectory(inversion, cells, encoded, plan)
    elif pipe.is_for_inpainting:
        start = _starts_with_extra_channels(pipe, image, mask, cells, encoded, plan, from_noise=from_noise)
    else:
        start = _starts_with_blending(cells, encoded, plan, from_noise=from_noise)
    latents = pipe.sample(plan, tuple(encoded.mean.shape[1:]), start)
    return [one.crop((0, 0, *image.size)) for one in to_pil(pipe.decode(latents, tile=plan.options.vae_tile))]


def starts_on_trajectory(
    inversion: Inversion, cells: Tensor, encoded: LatentDistribution, plan: Plan
) -> Callable[[slice, NoiseStream], Start]:
    """From the inversion's noise, with what is to be kept held on its trajectory.

    Raises:
        UsageError: the inversion is of another image, or holds no latents at a level of the plan.
    """
    own, inverted = encoded.mode(), inversion.latents[-1:].to(cells.device)
    if own.shape != inverted.shape or (own - inverted).std() > SAME_IMAGE * own.std():
        raise UsageError(
            "expected an inversion of this image, found one of another; invert this image at its own size"
        )
    known = {level: inversion.at(level).to(cells.device) for level in plan.levels}  # (1, C, h, w) each

    def put_back(x: Tensor, level: Level) -> Tensor:
        return cells * x + (1.0 - cells) * known[level]

    def start(part: slice, noise: NoiseStream) -> Start:
        return Start(known[plan.levels[0]].repeat(part.stop - part.start, 1, 1, 1), after_step=put_back)

    return start


def _starts_with_blending(
    cells: Tensor, encoded: LatentDistribution, plan: Plan, *, from_noise: bool
) -> Callable[[slice, NoiseStream], Start]:
    """For an ordinary model: after each step, what is to be kept is put back, with the start noise at the level
    reached."""

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
    image: Image.Image,
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
    shown = pipe.encode_images(to_tensor([extended(image, factor)]) * visible, tile=plan.options.vae_tile)

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
