"""Dynamic thresholding of the clean latents (Saharia et al. 2022, "Imagen", section 2.3)."""

from __future__ import annotations

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
    sizes = x0.flatten(1).float().abs()
    limit = sizes.quantile(settings.ratio, dim=1).clamp(1.0, settings.most).to(x0.dtype)
    limit = limit.view(-1, *[1] * (x0.ndim - 1))  # (N, 1, 1, 1)
    return x0.clamp(-limit, limit) / limit
