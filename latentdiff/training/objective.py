"""The training objective of diffusion: a noisy latent, what the model should say about it, and how much that counts."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from latentdiff.diffusion.parameterization import min_snr_weight, training_target
from latentdiff.diffusion.schedule import Schedule
from latentdiff.training.data.randomness import Key, uniform


class DiffusionObjective(nn.Module):
    """Noise levels of a schedule as tensors on the device, and the squared error of a prediction.

    Args:
        schedule: the noise schedule; its configuration says what the model predicts.
        min_snr_gamma: gamma of the min-SNR weight (Hang et al. 2023, eq. 8); None weighs all timesteps the same.
    """

    alpha: Tensor
    sigma: Tensor

    def __init__(self, schedule: Schedule, min_snr_gamma: float | None) -> None:
        super().__init__()
        self._prediction_type = schedule.config.prediction_type
        self._gamma = min_snr_gamma
        self.register_buffer("alpha", schedule.alphas_cumprod.sqrt().float(), persistent=False)
        self.register_buffer("sigma", (1 - schedule.alphas_cumprod).sqrt().float(), persistent=False)

    def noisy(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_t = alpha x_0 + sigma eps for latents and noise (N, C, h, w) and timesteps (N,)."""
        alpha, sigma = self._levels(timesteps)
        return alpha * latents + sigma * noise

    def errors(self, prediction: Tensor, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Mean squared error of each sample's raw prediction, (N,)."""
        alpha, sigma = self._levels(timesteps)
        target = training_target(self._prediction_type, latents, noise, alpha, sigma)
        return (prediction.float() - target).square().flatten(1).mean(1)

    def weights(self, timesteps: Tensor) -> Tensor:
        """Weight of each sample's error, (N,)."""
        alpha, sigma = self._levels(timesteps)
        if self._gamma is None:
            return torch.ones_like(alpha).flatten()
        return min_snr_weight(self._prediction_type, alpha, sigma, self._gamma).flatten()

    def _levels(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        shape = (-1, 1, 1, 1)
        return self.alpha[timesteps].view(shape), self.sigma[timesteps].view(shape)


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
