"""Classifier-free guidance: from a model, a prompt and a negative prompt to a denoiser.

Ho & Salimans 2022; the rescale is from Lin et al. 2023 (section 3.4), the interval from Kynkäänniemi et al. 2024.
Nothing outside this file knows in which order the two halves of a guided batch stand.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from latentdiff.diffusion.guidance_kinds import (
    Combine,
    Projection,
    Weakening,
    check_kind,
    nearest_negative,
    projected,
    renoised,
    thresholded_guidance,
)
from latentdiff.diffusion.parameterization import Denoiser, Parameterization, Prediction
from latentdiff.diffusion.schedule import Level
from latentdiff.errors import UsageError

# (x (N, C, h, w), t, context of batch N) -> raw output (N, C, h, w). In a guided step N is twice the number of images.
Model = Callable[[Tensor, float, Any], Tensor]

EVERYWHERE = (0.0, math.inf)  # all noise levels


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """How strongly, and where, the prompt is emphasized over the negative prompt.

    scale: 1 follows the prompt alone, more emphasizes it, 0 follows the negative prompt alone.
    rescale: 0 to 1, how far the standard deviation of each image's prediction is brought back to that of the unguided
        one.
    interval: the noise levels sigma_hat at which guidance acts, low < sigma_hat <= high. Outside, the prompt alone is
        followed.
    kind: what is made of the two outputs; see `guidance_kinds`.
    projection: the numbers of the kind apg.
    percentile: of the kind threshold, the share of values that are not clipped.
    weakening: what is led away from besides, at the same noise levels, whatever the scale.
    image_scale: how strongly to follow the image that the U-Net sees, at the same noise levels: 1 follows it as it is, more
        leads away from what is expected without it (Brooks et al. 2023, eq. 3).

    Raises:
        UsageError: a value outside its domain.
    """

    scale: float = 1.0
    rescale: float = 0.0
    interval: tuple[float, float] = EVERYWHERE
    kind: str = "cfg"
    projection: Projection = Projection()
    percentile: float = 0.995
    weakening: Weakening | None = None
    image_scale: float = 1.0

    def __post_init__(self) -> None:
        if not math.isfinite(self.scale):
            raise UsageError(f"guidance scale must be a finite number, found {self.scale}")
        if not 0.0 <= self.rescale <= 1.0:
            raise UsageError(f"guidance rescale must lie in 0 to 1, found {self.rescale}")
        low, high = self.interval
        if not 0.0 <= low < high:
            raise UsageError(f"guidance interval must be two noise levels, 0 <= low < high, found {low} and {high}")
        if self.kind != "cfg":
            check_kind(self.kind, self.scale, self.rescale)
        if (self.weakening or self.image_scale != 1.0) and self.kind == "cfg++":
            raise UsageError(
                "pag, seg and guidance by an image go with other kinds than cfg++, which is found; leave one of them out"
            )

    @property
    def is_off(self) -> bool:
        """Whether the prompt alone is followed at all levels."""
        return self.scale == 1.0 and self.kind != "cfg++"

    def acts_at(self, level: Level) -> bool:
        """Whether the unconditional half is needed at `level`."""
        return not self.is_off and self._covers(level)

    def image_acts_at(self, level: Level) -> bool:
        """Whether what is expected without the image is needed at `level`."""
        return self.image_scale != 1.0 and self._covers(level)

    def pusher(self, weakened: Model | None) -> Callable[[Tensor, Tensor, Level, Any], Tensor | None]:
        """(positive, x, level, context) -> what leads away from the weakened model, added to the guided output; None where it
        does not act."""

        def push(positive: Tensor, x: Tensor, level: Level, context: Any) -> Tensor | None:
            if self.weakening is None or weakened is None or not self._covers(level):
                return None
            return self.weakening.scale * (positive - weakened(x, level.t, context).to(x.dtype))

        return push

    def _covers(self, level: Level) -> bool:
        low, high = self.interval
        return low < level.sigma_hat <= high

    def combiner(self, parameterization: Parameterization) -> Combine:
        """What is followed on one walk, of its kind."""
        if self.kind == "cfg++":
            return renoised(self.scale, parameterization)
        if self.kind == "apg":
            return projected(self.scale, parameterization, self.projection)

        if self.kind == "threshold":
            return thresholded_guidance(self.scale, parameterization, self.percentile)

        def combine(negative: Tensor, positive: Tensor, x: Tensor, level: Level, push: Tensor | None) -> Prediction:
            return parameterization(self.combine(negative, positive, push), x, level, guided=True)

        return combine

    def combine(self, negative: Tensor, positive: Tensor, push: Tensor | None = None) -> Tensor:
        """The guided output from the two raw outputs, all (N, C, h, w), of the kinds cfg and zero-star, and a push."""
        if self.kind == "zero-star":
            negative = nearest_negative(negative, positive)
        guided = pushed(negative + self.scale * (positive - negative), push)
        if self.rescale == 0.0:
            return guided
        image = tuple(range(1, guided.ndim))
        ratio = positive.std(image, keepdim=True) / guided.std(image, keepdim=True)  # (N, 1, 1, 1)
        return guided * (self.rescale * ratio + 1.0 - self.rescale)


UNGUIDED = Guidance()


def pushed(raw: Tensor, push: Tensor | None) -> Tensor:
    """The sum of the two."""
    return raw if push is None else raw + push


def guided_denoiser(
    model: Model,
    parameterization: Parameterization,
    context: Any,
    negative_context: Any = None,
    guidance: Guidance = UNGUIDED,
    weakened: Model | None = None,
    unseen: Any = None,
) -> Denoiser:
    """A denoiser that follows `context` and avoids `negative_context`.

    Both halves go through the model as one batch of 2N where guidance acts, of 3N where that of an image does as well, and
    only the N prompts elsewhere.

    Args:
        context, negative_context: of batch N; tensors (N, L, D), or a type that joins its instances with its own `cat`.
        weakened: the model that `guidance.weakening` means.
        unseen: the negative context without the image that `guidance.image_scale` means.

    Raises:
        UsageError: guidance was asked for without a negative context.
    """
    combine, push = guidance.combiner(parameterization), guidance.pusher(weakened)
    cat = getattr(type(context), "cat", torch.cat)
    if guidance.is_off:
        both = None
    elif negative_context is None:
        raise UsageError(
            f"guidance scale {guidance.scale} needs a negative context (the embedding of an empty prompt will do)"
        )
    else:
        both = cat([negative_context, context])
    three = None if unseen is None else cat([unseen, negative_context, context])

    def denoise(x: Tensor, level: Level) -> Prediction:
        if three is not None and guidance.image_acts_at(level):
            blank, negative, positive = model(torch.cat([x, x, x]), level.t, three).to(x.dtype).chunk(3)
            led = (guidance.image_scale - 1.0) * (negative - blank)
            led = pushed(led, push(positive, x, level, context))
            if guidance.acts_at(level):
                return combine(negative, positive, x, level, led)
            return parameterization(positive + led, x, level, guided=True)
        if guidance.acts_at(level):
            negative, positive = model(torch.cat([x, x]), level.t, both).to(x.dtype).chunk(2)
            return combine(negative, positive, x, level, push(positive, x, level, context))
        positive = model(x, level.t, context).to(x.dtype)
        found = push(positive, x, level, context)
        return parameterization(pushed(positive, found), x, level, guided=found is not None)

    return denoise


@dataclass(frozen=True)
class Composition:
    """Several texts for each image, composed with weights (Liu et al. 2022; `AND` of the web UIs).

    context: of batch P, of a type as `guided_denoiser` takes it.
    images: which image of the batch of N each row of `context` is for.
    weights: of the rows.
    """

    context: Any
    images: Sequence[int]
    weights: Sequence[float]


def composed_denoiser(
    model: Model,
    parameterization: Parameterization,
    composition: Composition,
    negative_context: Any,
    guidance: Guidance = UNGUIDED,
    weakened: Model | None = None,
) -> Denoiser:
    """Like `guided_denoiser`, for images that follow several texts: D = D_neg + sum_i w_i (D_i - D_neg) is what is
    followed, so that guidance gives D_neg + sum_i w_i scale (D_i - D_neg).

    Negatives and texts go through the model as one batch of N + P at all levels, whether guidance acts or not.

    Args:
        negative_context: of batch N.
    """
    combine, push = guidance.combiner(parameterization), guidance.pusher(weakened)
    every = getattr(type(composition.context), "cat", torch.cat)([negative_context, composition.context])

    def denoise(x: Tensor, level: Level) -> Prediction:
        images = torch.tensor(composition.images, device=x.device)  # (P,)
        weights = torch.tensor(composition.weights, device=x.device, dtype=x.dtype)[:, None, None, None]
        raw = model(torch.cat([x, x[images]]), level.t, every).to(x.dtype)
        negative, texts = raw[: len(x)], raw[len(x) :]
        followed = negative.index_add(0, images, weights * (texts - negative[images]))
        found = push(texts, x[images], level, composition.context)
        if found is not None:
            found = torch.zeros_like(x).index_add(0, images, weights * found)
        if guidance.acts_at(level):
            return combine(negative, followed, x, level, found)
        return parameterization(pushed(followed, found), x, level, guided=found is not None)

    return denoise


def staged_denoiser(of_step: Callable[[int], Denoiser], levels: Sequence[Level]) -> Denoiser:
    """A denoiser that may be another one at each step of a walk down `levels`, counted from 1.

    Solvers that evaluate between two levels meet the step that leads from one to the other.
    """
    above = [level.sigma_hat for level in levels[:-1]]

    def denoise(x: Tensor, level: Level) -> Prediction:
        return of_step(max(1, sum(sigma_hat >= level.sigma_hat for sigma_hat in above)))(x, level)

    return denoise


def blended_denoiser(
    model: Model,
    parameterization: Parameterization,
    context: Any,
    empty_context: Any,
    negative_context: Any,
    guidance: Guidance,
    share_of_empty: Callable[[Level], float],
) -> Denoiser:
    """Like `guided_denoiser`, but guided away from a blend of the empty prompt, in the share that is said, and the
    negative.

    Tumanyan et al. 2023 edit with it: the negative prompt says what the source shows, and acts more and more towards
    the end. The three go through the model as one batch of 3N where guidance acts.
    """
    three = getattr(type(context), "cat", torch.cat)([empty_context, negative_context, context])

    def denoise(x: Tensor, level: Level) -> Prediction:
        guided = guidance.acts_at(level)
        if guided:
            empty, negative, positive = model(torch.cat([x, x, x]), level.t, three).to(x.dtype).chunk(3)
            share = share_of_empty(level)
            raw = guidance.combine(share * empty + (1.0 - share) * negative, positive)
        else:
            raw = model(x, level.t, context).to(x.dtype)
        return parameterization(raw, x, level, guided=guided)

    return denoise
