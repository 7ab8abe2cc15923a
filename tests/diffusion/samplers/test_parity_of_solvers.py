"""The same latents as diffusers' solvers, driven by one and the same model, under every schedule that they have."""

from __future__ import annotations

import importlib
import math
import sys
from types import ModuleType

import diffusers
import pytest
import torch
from torch import Tensor

from latentdiff.diffusion.config import ScheduleConfig
from latentdiff.diffusion.guidance import guided_denoiser
from latentdiff.diffusion.latents import NoiseStream
from latentdiff.diffusion.parameterization import parameterization
from latentdiff.diffusion.samplers import get_sampler
from latentdiff.diffusion.schedule import Schedule
from tests import analytic
from tests.diffusion.samplers.test_parity import SHAPE, model_of

# Float noise: latents have unit variance, and a grey level is about 0.008 of it.
TOLERANCE = 1e-4
# Where diffusers cuts an interpolated timestep, rounding decides between one and the next.
CUT_TOLERANCE = 1e-3
STEPS = (5, 10, 25)
SEEDS = [5, 6]
FLAGS = {"karras": "use_karras_sigmas", "exponential": "use_exponential_sigmas", "beta": "use_beta_sigmas"}

# Sampler -> diffusers' scheduler, and the settings that make it the same.
PEERS = {
    "euler": (diffusers.EulerDiscreteScheduler, {}),
    "euler-a": (diffusers.EulerAncestralDiscreteScheduler, {}),
    "heun": (diffusers.HeunDiscreteScheduler, {}),
    "dpm2": (diffusers.KDPM2DiscreteScheduler, {}),
    "dpm2-a": (diffusers.KDPM2AncestralDiscreteScheduler, {}),
    "lms": (diffusers.LMSDiscreteScheduler, {}),
    "dpmpp-2m": (diffusers.DPMSolverMultistepScheduler, {}),
    "dpmpp-2m-sde": (diffusers.DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}),
    "dpmpp-2s": (diffusers.DPMSolverSinglestepScheduler, {"lower_order_final": True}),
    "unipc": (diffusers.UniPCMultistepScheduler, {}),
    "pndm": (diffusers.PNDMScheduler, {"skip_prk_steps": True}),
    "lcm": (diffusers.LCMScheduler, {}),
    "tcd": (diffusers.TCDScheduler, {}),
}
DRAW = ("euler-a", "dpm2-a", "dpmpp-2m-sde", "lcm", "tcd")
WITHOUT_FLAGS = ("euler-a", "pndm", "lcm", "tcd")
CASES = [
    *((name, None) for name in PEERS),
    *((name, spacing) for name in ("euler-a", "heun", "dpm2", "dpm2-a", "lms") for spacing in ("leading", "trailing")),
    *((name, spacing) for name in PEERS if name not in WITHOUT_FLAGS for spacing in FLAGS),
]


def theirs(name: str, schedule: Schedule, steps: int, config: dict) -> Tensor:
    """What diffusers' pipeline does with its scheduler."""
    cls, settings = PEERS[name]
    scheduler = cls.from_config({**config, **settings})
    scheduler.set_timesteps(steps)
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    x = torch.cat([torch.randn(1, *SHAPE, generator=generator) for generator in generators])
    x = x * scheduler.init_noise_sigma
    randomness = {"generator": generators} if name in DRAW else {}
    for t in scheduler.timesteps:
        raw = model_of(schedule)(scheduler.scale_model_input(x, t), float(t))
        x = scheduler.step(raw, t, x, **randomness).prev_sample
    return x


def ours(name: str, schedule: Schedule, steps: int, spacing: str | None) -> Tensor:
    draws = {"sde_noise": "draws"} if name == "dpmpp-2m-sde" else {}
    sampler, noise = get_sampler(name, **draws).over(schedule, steps), NoiseStream(SEEDS, SHAPE)
    denoiser = guided_denoiser(model_of(schedule), parameterization(schedule.config.prediction_type), None)
    x = noise() * sampler.start_scale(schedule, spacing)
    return analytic.sample(denoiser, x, sampler.levels(schedule, steps, spacing), sampler.step, noise=noise)


@pytest.mark.parametrize(
    ("name", "spacing", "prediction"),
    [*((*case, "epsilon") for case in CASES), *((name, None, "v_prediction") for name in PEERS)],
)
def test_latents_are_those_of_diffusers(name: str, spacing: str | None, prediction: str) -> None:
    in_timesteps = spacing if spacing not in FLAGS else None
    schedule = Schedule(ScheduleConfig(prediction_type=prediction, timestep_spacing=in_timesteps))
    config = {key: value for key, value in schedule.config.to_diffusers().items() if key != "_class_name"}
    config |= {FLAGS[spacing]: True} if spacing in FLAGS else {}
    for steps in STEPS:
        found, expected = ours(name, schedule, steps, spacing), theirs(name, schedule, steps, config)
        tolerance = CUT_TOLERANCE if spacing in FLAGS else TOLERANCE
        assert (found - expected).abs().max() < tolerance, f"at {steps} steps"


def rough(sigma: float, next_sigma: float) -> Tensor:
    """Noise for two levels that does not notice their rounding, as a path would: it varies with the root of it."""
    first, second = (round(50.0 * math.log(float(level))) for level in (sigma, next_sigma))
    return torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(100_000 + 1000 * first + second))


class Increments:
    """Stands in for torchsde's tree in diffusers."""

    def __init__(self, x: Tensor, low: float, high: float, seed: object) -> None:
        """Takes what torchsde takes."""

    def __call__(self, sigma: Tensor, next_sigma: Tensor) -> Tensor:
        return rough(float(sigma), float(next_sigma))


@pytest.mark.parametrize("spacing", [None, "karras"])
def test_dpmpp_sde_is_that_of_diffusers_with_the_same_noise(
    spacing: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torchsde", ModuleType("torchsde"))  # it need not be there
    module = importlib.import_module("diffusers.schedulers.scheduling_dpmsolver_sde")
    monkeypatch.setattr(module, "BrownianTreeNoiseSampler", Increments)
    monkeypatch.setattr(NoiseStream, "between", lambda self, sigma, next_sigma: rough(sigma, next_sigma))
    monkeypatch.setitem(PEERS, "dpmpp-sde", (module.DPMSolverSDEScheduler, {}))
    schedule = Schedule(ScheduleConfig())
    config = {key: value for key, value in schedule.config.to_diffusers().items() if key != "_class_name"}
    config |= {FLAGS[spacing]: True} if spacing else {}
    for steps in STEPS:
        found, expected = ours("dpmpp-sde", schedule, steps, spacing), theirs("dpmpp-sde", schedule, steps, config)
        assert (found - expected).abs().max() < 1e-3, f"at {steps} steps"
