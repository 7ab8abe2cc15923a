"""The training objective of diffusion: a noisy latent, what the model should say about it, and how much that counts."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from latentdiff.diffusion.parameterization import debiased_weight, min_snr_weight, training_target, velocity
from latentdiff.diffusion.schedule import Schedule
from latentdiff.training.data.randomness import Key, uniform
from latentdiff.training.sections import ObjectiveSection


class DiffusionObjective(nn.Module):
    """Noise levels of a schedule as tensors on the device, and what an error of a prediction costs.

    Args:
        schedule: the noise schedule; its configuration says what the model predicts.
        settings: the form of the loss, and how much each noise level counts.
    """

    alpha: Tensor
    sigma: Tensor

    def __init__(self, schedule: Schedule, settings: ObjectiveSection) -> None:
        super().__init__()
        self._prediction_type = schedule.config.prediction_type
        self._settings = settings
        self.register_buffer("alpha", schedule.alphas_cumprod.sqrt().float(), persistent=False)
        self.register_buffer("sigma", (1 - schedule.alphas_cumprod).sqrt().float(), persistent=False)

    def noisy(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_t = alpha x_0 + sigma eps for latents and noise (N, C, h, w) and timesteps (N,)."""
        alpha, sigma = self._levels(timesteps)
        return alpha * latents + sigma * noise

    def differences(self, prediction: Tensor, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the raw prediction is off by, (N, C, h, w) in float32."""
        alpha, sigma = self._levels(timesteps)
        return prediction.float() - training_target(self._prediction_type, latents, noise, alpha, sigma)

    def velocity(self, raw: Tensor, x: Tensor, timesteps: Tensor) -> Tensor:
        """The velocity that the raw prediction for noisy latents x amounts to, all (N, C, h, w)."""
        return velocity(self._prediction_type, raw.float(), x, *self._levels(timesteps))

    def moved(self, x: Tensor, raw: Tensor, timesteps: Tensor, following: Tensor) -> Tensor:
        """x (N, C, h, w) of one timestep each, carried to another by the DDIM step without added noise (Song et al. 2021,
        equation 12), of which the raw prediction says the direction."""
        alpha, sigma = self._levels(timesteps)
        v = self.velocity(raw, x, timesteps)
        return self.noisy(alpha * x - sigma * v, sigma * x + alpha * v, following)

    def costs(self, differences: Tensor, timesteps: Tensor) -> Tensor:
        """What the differences cost, each for itself: squares, or the pseudo-Huber function of them.

        The latter, 2 c (sqrt(d² + c²) - c), is d² for small d and grows like 2 c |d|; c may depend on the timestep
        (Khrapov et al. 2024, "Improving Diffusion Models's Data-Corruption Resistance using Scheduled Pseudo-Huber
        Loss").
        """
        if self._settings.loss != "huber":
            return differences.square()
        c = self._huber_c(timesteps)
        return 2 * c * ((differences.square() + c.square()).sqrt() - c)

    def weights(self, timesteps: Tensor) -> Tensor:
        """Weight of each sample's error, (N,)."""
        alpha, sigma = self._levels(timesteps)
        if self._settings.debiased:
            return debiased_weight(self._prediction_type, alpha, sigma).flatten()
        if self._settings.min_snr_gamma is None:
            return torch.ones_like(alpha).flatten()
        return min_snr_weight(self._prediction_type, alpha, sigma, self._settings.min_snr_gamma).flatten()

    def _huber_c(self, timesteps: Tensor) -> Tensor:
        """c of each sample, (N, 1, 1, 1): from 1 at no noise to `huber_c` at the noisiest."""
        alpha, sigma = self._levels(timesteps)
        least = self._settings.huber_c
        if self._settings.huber_schedule == "snr":
            return (1 - least) / (1 + sigma / alpha).square() + least
        if self._settings.huber_schedule == "exponential":
            return (least ** (timesteps / len(self.alpha))).view(alpha.shape)
        return torch.full_like(alpha, least)

    def _levels(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        shape = (-1, 1, 1, 1)
        return self.alpha[timesteps].view(shape), self.sigma[timesteps].view(shape)


def masked_mean(costs: Tensor, masks: Tensor | None) -> Tensor:
    """Mean cost of each sample, (N,), in which every place counts by its mask.

    Less than one whole latent in white counts as what it is, so that a crop without the object teaches nothing.

    Args:
        costs: (N, C, h, w).
        masks: (N, 1, h, w) in [0, 1]; None counts all the same.
    """
    if masks is None:
        return costs.flatten(1).mean(1)
    return (costs.mean(1, keepdim=True) * masks).flatten(1).sum(1) / masks.flatten(1).sum(1).clamp(min=1)


# The noisiest part of the range of timesteps. There an image's layout is decided, and only there: a little later the
# noisy latents themselves show it, so the words about it hardly change the loss.
_HIGH_NOISE = 0.1


def draw_timesteps(
    key: Key, rows: range, batch_size: int, num_train_timesteps: int, high_noise_share: float = 0.0
) -> np.ndarray:
    """Timesteps of the given rows of a batch, (len(rows),) int64; each one is uniform on 0 ... T-1.

    Over the batch they are spread evenly, which makes the loss less noisy (Kingma et al. 2021, "Variational Diffusion
    Models", appendix I.1).

    Args:
        high_noise_share: of the timesteps, 0 to 1, that are drawn from the noisiest tenth alone.
    """
    spread = (uniform(key, range(1)) + np.asarray(rows) / batch_size) % 1
    below = (1 - high_noise_share) * (1 - _HIGH_NOISE)  # share of the timesteps that lie below the noisiest tenth
    knots = ([0.0, below, 1.0], [0.0, 1 - _HIGH_NOISE, 1.0])
    return (np.interp(spread, *knots) * num_train_timesteps).astype(np.int64)
