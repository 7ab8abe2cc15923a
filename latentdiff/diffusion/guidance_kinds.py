"""Kinds of guidance: what is followed, given what the model says of the prompt and of the negative one.

cfg        negative + scale (positive - negative), of the raw outputs (Ho & Salimans 2022)
cfg++      the guided x0, and the noise of the negative prompt; scale 0 to 1 (Chung et al. 2024, algorithm 2)
apg        of x0: the part across the positive prediction, bounded, with momentum (Sadat et al. 2024, algorithm 1)
zero-star  as cfg, the negative output scaled first to lie nearest to the positive (Fan et al. 2025, eq. 8)
threshold  as cfg, its x0 brought back to the range of the positive one (dynamic thresholding, Saharia et al. 2022, section 2.3)

All but cfg++ may be led away from weakened attention besides: + scale (positive - weakened), of the raw outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from latentdiff.diffusion.parameterization import Parameterization, Prediction
from latentdiff.diffusion.schedule import Level
from latentdiff.diffusion.thresholding import clipped
from latentdiff.errors import UsageError

GUIDANCE_KINDS = ("cfg", "cfg++", "apg", "zero-star", "threshold")
# Samplers whose step is alpha' x0 + sigma' eps, with noise added or not: in others, cfg++ has no meaning.
CFG_PP_SAMPLERS = ("ddim", "euler", "euler-a")

# (negative, positive, x, level, push) -> what is followed; raw outputs and latents (N, C, h, w). The push is what is added to
# the guided raw output; None is nothing.
Combine = Callable[[Tensor, Tensor, Tensor, Level, Tensor | None], Prediction]


@dataclass(frozen=True)
class Projection:
    """The numbers of apg. With eta 1, no bound and no momentum it is cfg.

    eta: share of the part along the positive prediction, which raises contrast, 0 to 1.
    bound: longest difference of the two predictions of an image; 0 is none.
    momentum: share of the last difference that is added to this one; below 0 it says what is new.
    """

    eta: float = 0.0
    bound: float = 15.0
    momentum: float = -0.5


@dataclass(frozen=True)
class Weakening:
    """What guidance leads away from besides: the model with weakened self-attention in its middle.

    scale: how strongly; 0 is not at all.
    blur: None lets each place see itself alone (PAG, Ahn et al. 2024, eq. 13). A number blurs the queries with that standard
        deviation in cells, and infinity takes their mean (SEG, Hong 2024, eq. 9).
    """

    scale: float
    blur: float | None = None


def renoised(scale: float, parameterization: Parameterization) -> Combine:
    """cfg++."""

    def combine(negative: Tensor, positive: Tensor, x: Tensor, level: Level, push: Tensor | None) -> Prediction:
        guided = parameterization(negative + scale * (positive - negative), x, level, guided=True)
        return replace(guided, eps=parameterization(negative, x, level).eps)

    return combine


def projected(scale: float, parameterization: Parameterization, projection: Projection) -> Combine:
    """apg; its momentum is that of one walk, and starts over where the noise rises."""
    last: Tensor | None = None
    before = float("inf")

    def combine(negative: Tensor, positive: Tensor, x: Tensor, level: Level, push: Tensor | None) -> Prediction:
        nonlocal last, before
        followed = parameterization(positive, x, level).x0
        difference = followed - parameterization(negative, x, level).x0
        if last is not None and last.shape == difference.shape and level.sigma_hat <= before:
            difference = difference + projection.momentum * last
        last, before = difference, level.sigma_hat
        x0 = followed + (scale - 1.0) * projected_update(difference, followed, projection)
        found = predicted(x0, x, level, parameterization)
        return found if push is None else parameterization(found.raw + push, x, level, guided=True)

    return combine


def thresholded_guidance(scale: float, parameterization: Parameterization, percentile: float) -> Combine:
    """Dynamic thresholding: where the values of a guided x0 at `percentile` exceed the range of the positive x0, larger
    ones are clipped and all are divided, so that it keeps to that range.

    In the paper the range is that of pixels, -1 to 1; latents have none, and the positive prediction has that of the image.
    """

    def combine(negative: Tensor, positive: Tensor, x: Tensor, level: Level, push: Tensor | None) -> Prediction:
        guided = negative + scale * (positive - negative)
        guided = parameterization(guided if push is None else guided + push, x, level).x0
        followed = parameterization(positive, x, level).x0
        return predicted(clipped(guided, percentile, followed.flatten(1).abs().amax(1)), x, level, parameterization)

    return combine


def predicted(x0: Tensor, x: Tensor, level: Level, parameterization: Parameterization) -> Prediction:
    """The guided prediction that says `x0` of `x`."""
    eps = (x - level.alpha * x0) / level.sigma
    alpha, sigma = (torch.tensor(share, dtype=x.dtype, device=x.device) for share in (level.alpha, level.sigma))
    return Prediction(x0, eps, parameterization.target(x0, eps, alpha, sigma), guided=True)


def projected_update(difference: Tensor, followed: Tensor, projection: Projection) -> Tensor:
    """The difference of two predictions (N, C, h, w), bounded, with less of what lies along `followed`."""
    image = tuple(range(1, difference.ndim))
    if projection.bound > 0.0:
        length = torch.linalg.vector_norm(difference, dim=image, keepdim=True)
        difference = difference * (projection.bound / length.clamp(min=projection.bound))
    unit = followed.double() / torch.linalg.vector_norm(followed.double(), dim=image, keepdim=True).clamp(min=1e-12)
    along = ((difference.double() * unit).sum(image, keepdim=True) * unit).to(difference.dtype)
    return difference - along + projection.eta * along


def nearest_negative(negative: Tensor, positive: Tensor) -> Tensor:
    """The multiple of the negative output of each image that lies nearest to the positive one."""
    image = tuple(range(1, negative.ndim))
    share = (positive * negative).sum(image, keepdim=True) / negative.square().sum(image, keepdim=True).clamp(min=1e-8)
    return share * negative


def check_kind(kind: str, scale: float, rescale: float) -> None:
    """Raise a UsageError if there is no such kind, or its numbers do not go with it."""
    if kind not in GUIDANCE_KINDS:
        raise UsageError(f"expected a kind of guidance of {', '.join(GUIDANCE_KINDS)}, found {kind!r}")
    if kind == "cfg++" and not 0.0 <= scale <= 1.0:
        raise UsageError(f"expected a guidance scale of 0 to 1 with cfg++, found {scale:g}; 0.6 is about 7.5 of cfg")
    if kind in ("cfg++", "apg", "threshold") and rescale:
        raise UsageError(f"guidance rescale goes with cfg and zero-star, found {rescale:g} with {kind}; leave it at 0")
