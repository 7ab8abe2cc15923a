"""Schedules: at which noise levels a sampler steps, other than at evenly spaced whole timesteps.

Each is a function of the log sigma_hat of every training timestep and the number of steps. Where programs of the field
mean different things by one name, each meaning has a name of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import numpy as np

from latentdiff.diffusion.samplers.beta import beta_quantile
from latentdiff.diffusion.schedule import NOISE_FREE, Level, Schedule
from latentdiff.errors import UsageError

KARRAS_RHO = 7.0
BETA = 0.6

# Ten steps and the clean end for Stable Diffusion 1.5, of 1000 timesteps (Sabour et al. 2024, "Align Your Steps").
ALIGNED_TIMESTEPS = (999, 850, 736, 645, 545, 455, 343, 233, 124, 24, 0)
# The same as sigma_hat, as the authors publish them; and those for Stable Diffusion XL.
ALIGNED_SD = (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029)
ALIGNED_XL = (14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029)

# How many evenly spaced steps latent consistency models were distilled for (Luo et al. 2023).
CONSISTENCY_STEPS = 50

# (log sigma_hat of every timestep (T,), rising; steps) -> log sigma_hat of the steps, falling. The end is free of noise
# unless `ENDS_NOISY` says that the last is the end.
Spacing = Callable[[np.ndarray, int], np.ndarray]


def normal(table: np.ndarray, steps: int) -> np.ndarray:
    """Even in timesteps from the last to the first, not rounded; "uniform" and "normal" of the web UIs."""
    return _at(table, np.linspace(len(table) - 1, 0, steps))


def sgm_uniform(table: np.ndarray, steps: int) -> np.ndarray:
    """Even in timesteps, with the first as the end that is not visited (generative-models by Stability AI)."""
    return _at(table, np.linspace(len(table) - 1, 0, steps + 1)[:-1])


def simple(table: np.ndarray, steps: int) -> np.ndarray:
    """Whole timesteps in even strides down from the last, rounded down."""
    return table[[-1 - i * len(table) // steps for i in range(steps)]]


def ddim_uniform(table: np.ndarray, steps: int) -> np.ndarray:
    """Every k-th timestep from 1 up, k = T // steps: more than `steps` of them where that does not come out even."""
    return table[1 :: len(table) // steps][::-1]


def karras(table: np.ndarray, steps: int, rho: float = KARRAS_RHO) -> np.ndarray:
    """Even in sigma_hat^(1/rho) (Karras et al. 2022, eq. 5)."""
    high, low = (math.exp(table[end] / rho) for end in (-1, 0))
    return rho * np.log(np.linspace(high, low, steps))


def exponential(table: np.ndarray, steps: int) -> np.ndarray:
    """Even in log SNR (Lu et al. 2022, "DPM-Solver", section 3.2)."""
    return np.linspace(table[-1], table[0], steps)


def polyexponential(table: np.ndarray, steps: int, rho: float = 1.0) -> np.ndarray:
    """Log sigma_hat is a polynomial of degree rho (k-diffusion); with 1 it is `exponential`, with more it is denser at
    the end."""
    return table[0] + np.linspace(1.0, 0.0, steps) ** rho * (table[-1] - table[0])


def beta(table: np.ndarray, steps: int) -> np.ndarray:
    """Quantiles of Beta(0.6, 0.6) between the ends, in sigma_hat: what AUTOMATIC1111's web UI and diffusers mean (Lee
    et al. 2024)."""
    low, high = np.exp(table[[0, -1]])
    return np.log(low + beta_quantile(1.0 - np.linspace(0.0, 1.0, steps), BETA) * (high - low))


def beta_timesteps(table: np.ndarray, steps: int) -> np.ndarray:
    """The same quantiles as whole timesteps, each once: what ComfyUI means; it can take fewer than `steps`."""
    quantiles = beta_quantile(1.0 - np.linspace(0.0, 1.0, steps, endpoint=False), BETA)
    return table[np.unique(np.rint(quantiles * (len(table) - 1)).astype(int))[::-1]]


def kl_optimal(table: np.ndarray, steps: int, *, to_table: bool = True) -> np.ndarray:
    """Even in the arc tangent of sigma_hat (Sabour et al. 2024, section 3.1).

    AUTOMATIC1111's web UI ends at the least noise of the table; ComfyUI (`to_table` False) steps from there to none.
    """
    low, high = np.arctan(np.exp(table[[0, -1]]))
    return np.log(np.tan(np.linspace(high, low, steps + to_table)))


def ays(table: np.ndarray, steps: int) -> np.ndarray:
    """Align Your Steps: a list found by optimisation, and its end; other numbers of steps than ten are interpolated in
    log sigma_hat, as in ComfyUI."""
    aligned = [round(t * (len(table) - 1) / ALIGNED_TIMESTEPS[0]) for t in ALIGNED_TIMESTEPS]
    last = len(aligned) - 1
    return np.interp(np.linspace(0, last, steps + 1)[:-1], np.arange(last + 1), table[aligned])


def aligned(table: np.ndarray, steps: int, *, sigmas: tuple[float, ...]) -> np.ndarray:
    """Align Your Steps as AUTOMATIC1111's web UI means it: the published sigma_hat, all of them before the end."""
    places = np.linspace(0, len(sigmas) - 1, steps)
    return np.interp(places, np.arange(len(sigmas)), np.log(sigmas))


def consistency(table: np.ndarray, steps: int) -> np.ndarray:
    """Of the 50 even timesteps of a latent consistency model, `steps` from the noisiest (Luo et al. 2023)."""
    count = min(CONSISTENCY_STEPS, len(table))
    if steps > count:
        raise UsageError(f"steps must be 1 to {count} with the spacing lcm, found {steps}")
    stride = len(table) // count
    return table[[(count - i * count // steps) * stride - 1 for i in range(steps)]]


def _at(table: np.ndarray, timesteps: np.ndarray) -> np.ndarray:
    return np.interp(timesteps, np.arange(len(table)), table)


NOISE_SPACINGS: dict[str, Spacing] = {
    "karras": karras,
    "uniform-lambda": exponential,
    "ays": ays,
    "normal": normal,
    "sgm-uniform": sgm_uniform,
    "simple": simple,
    "ddim-uniform": ddim_uniform,
    "exponential": exponential,
    "polyexponential": polyexponential,
    "beta": beta,
    "beta-comfy": beta_timesteps,
    "kl-optimal": kl_optimal,
    "kl-optimal-comfy": partial(kl_optimal, to_table=False),
    "ays-a1111": partial(aligned, sigmas=ALIGNED_SD),
    "ays-a1111-xl": partial(aligned, sigmas=ALIGNED_XL),
    "lcm": consistency,
}
ENDS_NOISY = ("kl-optimal",)
WITH_RHO = ("karras", "polyexponential")


def levels(
    schedule: Schedule,
    steps: int,
    spacing: str,
    *,
    told: Callable[[float], float] = float,
    rho: float | None = None,
    ends: tuple[Level, Level] | None = None,
) -> list[Level]:
    """The levels of one of `NOISE_SPACINGS`, one more than `steps` unless its docstring says otherwise.

    Args:
        told: the timestep that the model is told, of the one that belongs to the noise, interpolated in log sigma_hat.
        rho: of the spacings `WITH_RHO`, in place of the customary one.
        ends: the noisiest and the least noisy, of spacings that know only these; None are those of the schedule.

    Raises:
        UsageError: `steps` is not in 1 to T, or rho is not above 0 or not for this spacing.
    """
    schedule = schedule.with_finite_log_snr()
    if not 1 <= steps <= schedule.num_train_timesteps:
        raise UsageError(
            f"steps must be 1 to {schedule.num_train_timesteps}, the number of training timesteps, found {steps}"
        )
    space = NOISE_SPACINGS[spacing]
    if rho is not None:
        if spacing not in WITH_RHO or not 0.0 < rho < math.inf:
            raise UsageError(
                f"rho is a number above 0 for the spacings {' and '.join(WITH_RHO)}, found {rho} with {spacing}"
            )
        space = partial(space, rho=rho)
    table = schedule.log_sigma_hats
    noise = space(table if ends is None else np.array([-level.log_snr for level in ends[::-1]]), steps)
    timesteps = [told(_whole_if_near(t)) for t in np.interp(noise, table, np.arange(len(table)))]
    found = [Level(t, 1.0 / (1.0 + math.exp(2.0 * log))) for t, log in zip(timesteps, noise, strict=True)]
    if spacing in ENDS_NOISY:
        return [*found[:-1], Level(0.0, found[-1].alpha_cumprod, is_clean=True)]
    return [*found, NOISE_FREE]


def _whole_if_near(t: float) -> float:
    """A timestep without the rounding that interpolating there and back leaves."""
    return float(round(t)) if abs(t - round(t)) < 1e-6 else float(t)
