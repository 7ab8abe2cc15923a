"""The noise schedule: how much signal and how much noise every timestep holds, and which timesteps sampling visits.

Notation, used by all of the mathematics here:

    x_t = alpha x0 + sigma eps        a noisy latent; eps is unit normal
    alphas_cumprod = alpha^2          the schedule itself, a falling sequence over the training timesteps 0 … T-1
    alpha^2 + sigma^2 = 1             variance preserving
    sigma_hat = sigma / alpha         the noise level in the units of Karras et al. 2022 (EDM)
    log_snr = ln(alpha / sigma)       half the log signal-to-noise ratio (lambda of DPM-Solver)

Schedules live on the host: a `Level` holds Python floats, so a sampling loop never waits for the device.
"""

from __future__ import annotations

import math
from copy import copy
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor

from latentdiff.diffusion.config import ScheduleConfig
from latentdiff.errors import ConfigError, UsageError

# What stands for "no signal" where sigma_hat and log_snr have to be finite. diffusers takes the same.
TRACE_OF_SIGNAL = 2.0**-24

# The largest beta of the cosine schedule (Nichol & Dhariwal 2021, section 3.2).
COSINE_MAX_BETA = 0.999


@dataclass(frozen=True)
class Level:
    """One noise level: the timestep that the model is told, and the share of signal `alpha_cumprod` in [0, 1]."""

    t: float
    alpha_cumprod: float
    is_clean: bool = False  # the end of sampling; the model is not evaluated there, except by inversion

    @property
    def alpha(self) -> float:
        return math.sqrt(self.alpha_cumprod)

    @property
    def sigma(self) -> float:
        return math.sqrt(1.0 - self.alpha_cumprod)

    @property
    def sigma_hat(self) -> float:
        return self.sigma / self.alpha if self.alpha_cumprod > 0.0 else math.inf

    @property
    def log_snr(self) -> float:
        if self.alpha_cumprod in (0.0, 1.0):
            return -math.inf if self.alpha_cumprod == 0.0 else math.inf
        return 0.5 * (math.log(self.alpha_cumprod) - math.log1p(-self.alpha_cumprod))


# Where a sampler ends that removes all noise.
NOISE_FREE = Level(t=0.0, alpha_cumprod=1.0, is_clean=True)


def posterior_variance(level: Level, next_level: Level) -> float:
    """Variance of q(x_next | x, x0) for a step down in noise between any two levels.

    `beta_tilde` of DDPM (Ho et al. 2020, eq. 7), with the betas of the pair instead of neighbouring timesteps.

    Raises:
        UsageError: the step goes up in noise, where no posterior exists.
    """
    if next_level.alpha_cumprod < level.alpha_cumprod:
        raise UsageError("a stochastic step must lower the noise level; use the ddim sampler with eta 0 to go up")
    if next_level.alpha_cumprod == 1.0:
        return 0.0
    beta = 1.0 - level.alpha_cumprod / next_level.alpha_cumprod
    return beta * (1.0 - next_level.alpha_cumprod) / (1.0 - level.alpha_cumprod)


class Schedule:
    """The noise schedule of a model.

    Attributes:
        config: what the schedule was built from.
        alphas_cumprod: (T,), float64, falling; entry t belongs to training timestep t.

    Raises:
        ConfigError: epsilon-prediction with zero terminal SNR, where x0 cannot be recovered from pure noise.
    """

    def __init__(self, config: ScheduleConfig) -> None:
        if config.rescale_betas_zero_snr and config.prediction_type == "epsilon":
            raise ConfigError(
                "rescale_betas_zero_snr needs prediction_type v_prediction or sample, found epsilon: "
                "at the last timestep there is no signal that a noise prediction could reveal"
            )
        self.config = config
        alphas_cumprod = torch.cumprod(1.0 - _betas(config), dim=0)
        if not alphas_cumprod[-1] > 0.0:
            raise ConfigError(
                f"the schedule leaves no signal: {config.num_train_timesteps} timesteps of beta up to {config.beta_end} are "
                "too much; Stable Diffusion has 1000 up to 0.012"
            )
        if config.rescale_betas_zero_snr:
            alphas_cumprod = _rescale_to_zero_terminal_snr(alphas_cumprod)
        self.alphas_cumprod: Tensor = alphas_cumprod  # (T,)

    @property
    def num_train_timesteps(self) -> int:
        return len(self.alphas_cumprod)

    @property
    def clean(self) -> Level:
        """Where DDIM ends: free of noise if the configuration says `set_alpha_to_one`, else as noisy as timestep 0."""
        if self.config.set_alpha_to_one:
            return NOISE_FREE
        return Level(t=0.0, alpha_cumprod=self.alphas_cumprod[0].item(), is_clean=True)

    def level(self, t: float) -> Level:
        """The level of timestep `t` in [0, T-1]; between two timesteps, sigma_hat is interpolated linearly.

        Raises:
            UsageError: `t` lies outside.
        """
        last = self.num_train_timesteps - 1
        if not 0 <= t <= last:
            raise UsageError(f"timestep must lie in 0 to {last}, found {t}")
        below = math.floor(t)
        lower = Level(float(t), self.alphas_cumprod[below].item())
        if below == t:
            return lower
        upper = Level(float(t), self.alphas_cumprod[below + 1].item())
        sigma_hat = lower.sigma_hat + (t - below) * (upper.sigma_hat - lower.sigma_hat)
        return Level(float(t), 1.0 / (1.0 + sigma_hat**2))

    @property
    def log_sigma_hats(self) -> np.ndarray:
        """Log sigma_hat of every timestep, (T,), float64, rising; infinite where there is no signal."""
        alphas_cumprod = self.alphas_cumprod.numpy()
        return 0.5 * (np.log1p(-alphas_cumprod) - np.log(alphas_cumprod))

    def at_sigma_hat(self, sigma_hat: float) -> Level:
        """The level of any noise above 0; its timestep is interpolated in log sigma_hat, and held within the table."""
        table = self.log_sigma_hats
        t = np.interp(math.log(sigma_hat), table, np.arange(len(table)))
        return Level(float(t), 1.0 / (1.0 + sigma_hat**2))

    def timesteps(self, steps: int, spacing: str | None = None) -> list[int]:
        """The `steps` timesteps that sampling visits, distinct and falling (Lin et al. 2023, table 2).

        spacing:
            leading   multiples of ⌊T / steps⌋ plus `steps_offset`; never visits the last timestep
            trailing  equal strides counted down from the last timestep; right for few steps and zero terminal SNR
            linspace  from the last timestep to 0, both included
            None      what the configuration says, leading if it says nothing

        Raises:
            UsageError: `steps` is not in 1 to T, or the spacing is unknown.
        """
        total = self.num_train_timesteps
        if not 1 <= steps <= total:
            raise UsageError(f"steps must be 1 to {total}, the number of training timesteps, found {steps}")
        match spacing or self.config.timestep_spacing or "leading":
            case "leading":
                stride = total // steps
                first = stride * (steps - 1)
                offset = min(self.config.steps_offset, total - 1 - first)  # stay in range when all steps are taken
                return [first - stride * i + offset for i in range(steps)]
            case "trailing":
                return [round(total * (steps - i) / steps) - 1 for i in range(steps)]
            case "linspace":
                intervals = max(steps - 1, 1)
                return [round((total - 1) * (intervals - i) / intervals) for i in range(steps)]
            case unknown:
                raise UsageError(f"timestep spacing must be leading, trailing or linspace, found {unknown!r}")

    def levels(self, steps: int, spacing: str | None = None) -> list[Level]:
        """The `steps + 1` levels from the noisiest to the clean end; each neighbouring pair is one step."""
        return [*map(self.level, self.timesteps(steps, spacing)), self.clean]

    def with_finite_log_snr(self) -> Self:
        """The schedule with a trace of signal where zero-terminal-SNR rescaling left none, for solvers in log SNR."""
        finite = copy(self)
        finite.alphas_cumprod = self.alphas_cumprod.where(self.alphas_cumprod > 0.0, TRACE_OF_SIGNAL)
        return finite

    def add_noise(self, x0: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Diffuse `x0` to `timesteps`: x_t = alpha x0 + sigma noise.

        Args:
            x0, noise: (N, C, h, w).
            timesteps: (N,), integers in [0, T-1].
        """
        alphas_cumprod = self.alphas_cumprod[timesteps.cpu()].view(-1, 1, 1, 1)
        # The cast comes before the move: not every device knows float64.
        alpha = alphas_cumprod.sqrt().to(x0.dtype).to(x0.device)
        sigma = (1.0 - alphas_cumprod).sqrt().to(x0.dtype).to(x0.device)
        return alpha * x0 + sigma * noise


def _betas(config: ScheduleConfig) -> Tensor:
    """The variances of the single noising steps, (T,), float64."""
    if config.trained_betas is not None:
        return torch.tensor(config.trained_betas, dtype=torch.float64)
    steps, start, end = config.num_train_timesteps, config.beta_start, config.beta_end
    match config.beta_schedule:
        case "linear":  # Ho et al. 2020
            return torch.linspace(start, end, steps, dtype=torch.float64)
        case "scaled_linear":  # Rombach et al. 2022: linear in the square root
            return torch.linspace(math.sqrt(start), math.sqrt(end), steps, dtype=torch.float64).square()
        case "squaredcos_cap_v2":  # Nichol & Dhariwal 2021, eq. 17
            time = torch.linspace(0.0, 1.0, steps + 1, dtype=torch.float64)
            alphas_cumprod = torch.cos((time + 0.008) / 1.008 * math.pi / 2).square()
            return (1.0 - alphas_cumprod[1:] / alphas_cumprod[:-1]).clamp(max=COSINE_MAX_BETA)
        case unknown:
            raise ConfigError(f"beta_schedule must be scaled_linear, linear or squaredcos_cap_v2, found {unknown!r}")


def _rescale_to_zero_terminal_snr(alphas_cumprod: Tensor) -> Tensor:
    """Shift and scale alpha so that the first timestep stays and the last holds no signal (Lin et al. 2023, algorithm
    1)."""
    alphas = alphas_cumprod.sqrt()
    first, last = alphas[0], alphas[-1]
    return ((alphas - last) * (first / (first - last))).square()
