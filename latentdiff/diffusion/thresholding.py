"""Dynamic thresholding of the clean latents (Saharia et al. 2022, "Imagen", section 2.3)."""

from __future__ import annotations

import math
from dataclasses import replace

from torch import Tensor

from latentdiff.diffusion.drawing import Thresholding
from latentdiff.diffusion.parameterization import Denoiser, Prediction
from latentdiff.diffusion.schedule import Level


def thresholded(denoiser: Denoiser, settings: Thresholding) -> Denoiser:
    """The denoiser with its x0 thresholded; eps and the raw output stay as they are."""

    def denoise(x: Tensor, level: Level) -> Prediction:
        prediction = denoiser(x, level)
        return replace(prediction, x0=threshold(prediction.x0, settings))

    return denoise


def threshold(x0: Tensor, settings: Thresholding) -> Tensor:
    """x0 (N, C, h, w), each image clipped at a quantile of its absolute values and divided by that."""
    return clipped(x0, settings.ratio, x0.new_ones(len(x0)), settings.most)


def clipped(x0: Tensor, ratio: float, least: Tensor, most: float = math.inf) -> Tensor:
    """x0 (N, C, h, w) within `least` (N,) of 0: clipped at the quantile `ratio` of the absolute values of an image if that is
    more than `least`, or at `most`, and divided.

    Where the quantile lies within `least`, values beyond `least` are clipped.
    """
    least = least.float()
    limit = x0.flatten(1).float().abs().quantile(ratio, dim=1).clamp(max=most).maximum(least)
    limit, least = (size.to(x0.dtype).view(-1, *[1] * (x0.ndim - 1)) for size in (limit, least))  # (N, 1, 1, 1)
    return x0.clamp(-limit, limit) / (limit / least)
