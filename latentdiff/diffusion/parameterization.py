"""What a model predicts (the noise, the velocity or the clean latent) and how x0 and eps follow from it.

With x = alpha x0 + sigma eps and alpha² + sigma² = 1 (see `schedule.py`):

    epsilon       raw = eps                       Ho et al. 2020
    v_prediction  raw = alpha eps - sigma x0      Salimans & Ho 2022
    sample        raw = x0

The conversion happens here, once: samplers and guidance see only a `Prediction`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from latentdiff.diffusion.schedule import Level
from latentdiff.errors import ConfigError, UsageError


@dataclass(frozen=True)
class Prediction:
    """What a denoiser says about the latents x at one level; all tensors (N, C, h, w)."""

    x0: Tensor  # the clean latents
    eps: Tensor  # the noise
    raw: Tensor  # the model's own output, after guidance
    guided: bool = False  # whether guidance acted; solvers with a memory start over where this changes


# (x (N, C, h, w), level) -> Prediction. A model and its context make one; guidance and data consistency wrap one into
# another.
Denoiser = Callable[[Tensor, Level], Prediction]


@dataclass(frozen=True)
class Parameterization:
    """The equations of one kind of prediction.

    `a` and `s` stand for alpha and sigma: floats in sampling, tensors (N, 1, 1, 1) in training.
    """

    x0: Callable[[Tensor, Tensor, Any, Any], Tensor]  # (raw, x, a, s)
    eps: Callable[[Tensor, Tensor, Any, Any], Tensor]  # (raw, x, a, s)
    target: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # (x0, eps, a, s)
    min_snr_weight: Callable[[Tensor, Tensor, float], Tensor]  # (a, s, gamma)
    debiased_weight: Callable[[Tensor, Tensor], Tensor]  # (a, s)

    def __call__(self, raw: Tensor, x: Tensor, level: Level, *, guided: bool = False) -> Prediction:
        """Read the model's output `raw` for the latents `x`, both (N, C, h, w), at `level`.

        Raises:
            UsageError: the level holds no signal (epsilon) or no noise (sample), so that x0 or eps is undetermined.
        """
        x0 = self.x0(raw, x, level.alpha, level.sigma)
        eps = self.eps(raw, x, level.alpha, level.sigma)
        return Prediction(x0, eps, raw, guided)


def _divide(numerator: Tensor, denominator: Tensor | float) -> Tensor:
    if isinstance(denominator, float) and denominator == 0.0:
        raise UsageError(
            "x0 or eps is undetermined here: epsilon-prediction needs some signal, sample-prediction some noise"
        )
    return numerator / denominator


# The min-SNR weights are min(SNR, gamma), the weight on the error in x0, times the square of d x0 / d raw: 1 / SNR,
# sigma², 1. For v this is min(SNR, gamma) / (SNR + 1). Written so that none divides by zero at zero signal. The debiased
# weight on the error in x0 is sqrt(SNR), so 1 / sqrt(SNR) on that in eps, as its paper has it.
PARAMETERIZATIONS: dict[str, Parameterization] = {
    "epsilon": Parameterization(
        x0=lambda raw, x, a, s: _divide(x - s * raw, a),
        eps=lambda raw, x, a, s: raw,
        target=lambda x0, eps, a, s: eps,
        min_snr_weight=lambda a, s, gamma: (gamma * (s / a).square()).clamp(max=1.0),
        debiased_weight=lambda a, s: s / a,
    ),
    "v_prediction": Parameterization(
        x0=lambda raw, x, a, s: a * x - s * raw,
        eps=lambda raw, x, a, s: a * raw + s * x,
        target=lambda x0, eps, a, s: a * eps - s * x0,
        min_snr_weight=lambda a, s, gamma: torch.minimum(a.square(), gamma * s.square()),
        debiased_weight=lambda a, s: a * s,
    ),
    "sample": Parameterization(
        x0=lambda raw, x, a, s: raw,
        eps=lambda raw, x, a, s: _divide(x - a * raw, s),
        target=lambda x0, eps, a, s: x0,
        min_snr_weight=lambda a, s, gamma: (a / s).square().clamp(max=gamma),
        debiased_weight=lambda a, s: a / s,
    ),
}


def parameterization(name: str) -> Parameterization:
    """The equations of `epsilon`, `v_prediction` or `sample`.

    Raises:
        ConfigError: another name.
    """
    try:
        return PARAMETERIZATIONS[name]
    except KeyError:
        raise ConfigError(f"prediction_type must be one of {', '.join(PARAMETERIZATIONS)}, found {name!r}") from None


def velocity(name: str, raw: Tensor, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """The velocity alpha eps - sigma x0 that the output `raw` of a model for x = alpha x0 + sigma eps amounts to.

    raw, x and the result are (N, C, h, w), alpha and sigma (N, 1, 1, 1). It is not finite for epsilon without signal and
    for sample without noise.
    """
    parameterization(name)
    if name == "v_prediction":
        return raw
    return (raw - sigma * x) / alpha if name == "epsilon" else (alpha * x - raw) / sigma


def training_target(name: str, x0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """What the model should say about alpha x0 + sigma eps.

    x0, eps and the result are (N, C, h, w), alpha and sigma (N, 1, 1, 1).
    """
    return parameterization(name).target(x0, eps, alpha, sigma)


def min_snr_weight(name: str, alpha: Tensor, sigma: Tensor, gamma: float) -> Tensor:
    """Weight of the squared error of the training target, in the shape of alpha (Hang et al. 2023; gamma is usually
    5)."""
    return parameterization(name).min_snr_weight(alpha, sigma, gamma)


def debiased_weight(name: str, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Weight of the squared error of the training target, in the shape of alpha (Yu et al. 2024, "Debias the Training
    of Diffusion Models")."""
    return parameterization(name).debiased_weight(alpha, sigma)
