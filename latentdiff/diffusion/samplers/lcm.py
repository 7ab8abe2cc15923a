"""Latent consistency models: x0 in one evaluation, and noise back on top for the next (Luo et al. 2023, algorithm 3)."""

from __future__ import annotations

from torch import Tensor

from latentdiff.diffusion.denoise import Noise
from latentdiff.diffusion.parameterization import Denoiser
from latentdiff.diffusion.schedule import Level

SIGMA_DATA = 0.5
TIMESTEP_SCALING = 10.0


def step(
    denoiser: Denoiser, x: Tensor, level: Level, next_level: Level, state: None, noise: Noise
) -> tuple[Tensor, None]:
    """x_s = alpha_s f + sigma_s z with the consistency function f = c_skip x + c_out x0; the last step gives f itself.

    c_skip and c_out hold the boundary condition f(x, 0) = x; with the usual scaling of the timestep they are 0 and 1
    but for the smallest ones.
    """
    scaled = TIMESTEP_SCALING * level.t
    c_skip = SIGMA_DATA**2 / (scaled**2 + SIGMA_DATA**2)
    c_out = scaled / (scaled**2 + SIGMA_DATA**2) ** 0.5
    x = c_out * denoiser(x, level).x0 + c_skip * x
    return (x if next_level.is_clean else next_level.alpha * x + next_level.sigma * noise()), None
