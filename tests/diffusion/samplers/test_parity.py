"""The same latents as diffusers' schedulers, driven by one and the same model over every spacing and kind of
prediction."""

from __future__ import annotations

from itertools import pairwise

import diffusers
import pytest
import torch
from diffusers.schedulers import AysSchedules
from torch import Tensor

from latentdiff.diffusion.config import ScheduleConfig
from latentdiff.diffusion.guidance import guided_denoiser
from latentdiff.diffusion.latents import NoiseStream
from latentdiff.diffusion.parameterization import PARAMETERIZATIONS, parameterization
from latentdiff.diffusion.samplers import get_sampler
from latentdiff.diffusion.schedule import Schedule
from tests import analytic

SHAPE = (4, 6, 6)
STEPS = (10, 25, 30)
SPACINGS = ("leading", "trailing", "linspace")

# Float noise: latents have unit variance, and a grey level is about 0.008 of it.
TOLERANCE = 5e-5

# diffusers' schedulers, and the sampler and eta that stand for each here.
PEERS = {
    "ddim": (diffusers.DDIMScheduler, "ddim", 0.0),
    "ddim-eta": (diffusers.DDIMScheduler, "ddim", 1.0),
    "ddpm": (diffusers.DDPMScheduler, "ddpm", 0.0),
    "euler": (diffusers.EulerDiscreteScheduler, "euler", 0.0),
    "dpmpp-2m": (diffusers.DPMSolverMultistepScheduler, "dpmpp-2m", 0.0),
    "unipc": (diffusers.UniPCMultistepScheduler, "unipc", 0.0),
}


def model_of(schedule: Schedule):
    """An exact model in the schedule's parameterization, as a function of latents and timestep."""
    finite = schedule.with_finite_log_snr()
    parameters = parameterization(schedule.config.prediction_type)

    def model(x: Tensor, t: float, context: None = None) -> Tensor:
        level = finite.level(float(t))
        eps = analytic.exact_eps(x, level, analytic.MEANS, analytic.STDS, analytic.WEIGHTS)
        return parameters.target((x - level.sigma * eps) / level.alpha, eps, level.alpha, level.sigma)

    return model


def theirs(peer: str, schedule: Schedule, steps: int | list[int], config: dict, seeds: list[int]) -> Tensor:
    """What diffusers' pipeline does with its scheduler, given a number of steps or the timesteps themselves."""
    cls, _, eta = PEERS[peer]
    scheduler = cls.from_config(config)
    scheduler.set_timesteps(**({"num_inference_steps": steps} if isinstance(steps, int) else {"timesteps": steps}))
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    x = torch.cat([torch.randn(1, *SHAPE, generator=generator) for generator in generators])
    x = x * scheduler.init_noise_sigma
    randomness = {"ddim-eta": {"eta": eta, "generator": generators}, "ddpm": {"generator": generators}}.get(peer, {})
    for t in scheduler.timesteps:
        raw = model_of(schedule)(scheduler.scale_model_input(x, t), t)
        x = scheduler.step(raw, t, x, **randomness).prev_sample
    return x


def ours(peer: str, schedule: Schedule, steps: int, seeds: list[int], spacing: str | None = None) -> Tensor:
    _, name, eta = PEERS[peer]
    sampler, noise = get_sampler(name, eta=eta), NoiseStream(seeds, SHAPE)
    denoiser = guided_denoiser(model_of(schedule), parameterization(schedule.config.prediction_type), None)
    x = noise() * sampler.start_scale(schedule, spacing)
    return analytic.sample(denoiser, x, sampler.levels(schedule, steps, spacing), sampler.step, noise=noise)


def distance(peer: str, schedule: Schedule, steps: int) -> float:
    """The largest difference between the two, for two images with their own seeds."""
    config = {key: value for key, value in schedule.config.to_diffusers().items() if key != "_class_name"}
    found, expected = ours(peer, schedule, steps, [5, 6]), theirs(peer, schedule, steps, config, [5, 6])
    return (found - expected).abs().max().item()


def ddim_of_diffusers_is_wrong(steps: int, spacing: str) -> bool:
    """diffusers' DDIM takes t - T // steps for the next timestep, which trailing and linspace need not visit."""
    timesteps = Schedule(ScheduleConfig()).timesteps(steps, spacing)
    return any(t - 1000 // steps != s for t, s in pairwise(timesteps))


def test_ddim_of_diffusers_is_wrong_exactly_here() -> None:
    """There, its latents are at another noise level than the one that the model is told at the next step."""
    wrong = {(steps, spacing) for steps in STEPS for spacing in SPACINGS if ddim_of_diffusers_is_wrong(steps, spacing)}
    assert wrong == {(30, "trailing"), (10, "linspace"), (25, "linspace"), (30, "linspace")}


@pytest.mark.parametrize("prediction", PARAMETERIZATIONS)
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("peer", PEERS)
def test_latents_are_those_of_diffusers(peer: str, steps: int, spacing: str, prediction: str) -> None:
    schedule = Schedule(ScheduleConfig(prediction_type=prediction, timestep_spacing=spacing))
    if peer.startswith("ddim") and ddim_of_diffusers_is_wrong(steps, spacing):
        assert distance(peer, schedule, steps) > 100 * TOLERANCE
    else:
        assert distance(peer, schedule, steps) < TOLERANCE


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize(
    "changes",
    [
        {"set_alpha_to_one": True},
        {"steps_offset": 0},
        {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02},
        {"beta_schedule": "squaredcos_cap_v2"},
        {"num_train_timesteps": 500},
    ],
    ids=str,
)
def test_latents_are_those_of_diffusers_under_other_schedules(peer: str, changes: dict) -> None:
    schedule = Schedule(ScheduleConfig(timestep_spacing="leading", **changes))
    assert distance(peer, schedule, 25) < TOLERANCE


@pytest.mark.parametrize("peer", ["ddim", "ddpm", "euler", "dpmpp-2m", "unipc"])  # DDIM with eta gives NaN in diffusers
@pytest.mark.parametrize("prediction", ["v_prediction", "sample"])
def test_latents_are_those_of_diffusers_from_zero_terminal_snr(peer: str, prediction: str) -> None:
    config = ScheduleConfig(prediction_type=prediction, timestep_spacing="trailing", rescale_betas_zero_snr=True)
    for steps in (10, 25):
        assert (
            distance(peer, Schedule(config), steps) < 1e-4
        )  # Euler of diffusers divides by an alpha of 2**-12 in float32


# Spacings that are even in noise


@pytest.mark.parametrize(
    ("peer", "spacing", "flag"),
    [
        ("euler", "karras", "use_karras_sigmas"),
        ("dpmpp-2m", "karras", "use_karras_sigmas"),
        ("unipc", "karras", "use_karras_sigmas"),
        ("dpmpp-2m", "uniform-lambda", "use_lu_lambdas"),
        ("euler", "uniform-lambda", "use_exponential_sigmas"),
    ],
)
@pytest.mark.parametrize("prediction", PARAMETERIZATIONS)
def test_latents_are_those_of_diffusers_under_spacings_of_noise(
    peer: str, spacing: str, flag: str, prediction: str
) -> None:
    schedule = Schedule(ScheduleConfig(prediction_type=prediction))
    config = {key: value for key, value in schedule.config.to_diffusers().items() if key != "_class_name"}
    for steps in (2, 8, 25):
        expected = theirs(peer, schedule, steps, {**config, flag: True}, [5, 6])
        assert (ours(peer, schedule, steps, [5, 6], spacing) - expected).abs().max() < TOLERANCE


@pytest.mark.parametrize("peer", ["euler", "dpmpp-2m"])
def test_latents_are_those_of_diffusers_under_the_ten_steps_of_align_your_steps(peer: str) -> None:
    schedule = Schedule(ScheduleConfig())
    config = {key: value for key, value in schedule.config.to_diffusers().items() if key != "_class_name"}
    timesteps = AysSchedules["StableDiffusionTimesteps"]
    assert [level.t for level in get_sampler(PEERS[peer][1]).levels(schedule, 10, "ays")[:-1]] == pytest.approx(
        timesteps
    )
    expected = theirs(peer, schedule, timesteps, config, [5, 6])
    assert (ours(peer, schedule, 10, [5, 6], "ays") - expected).abs().max() < TOLERANCE


@pytest.mark.parametrize("peer", PEERS)
def test_a_file_that_is_silent_about_spacing_leaves_it_to_the_sampler(peer: str) -> None:
    """The scheduler_config.json of Stable Diffusion 1.5 itself: linspace for the solvers and leading for the others."""
    config = {
        "_class_name": "PNDMScheduler",
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "clip_sample": False,
        "num_train_timesteps": 1000,
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "steps_offset": 1,
        "trained_betas": None,
    }
    schedule = Schedule(ScheduleConfig.from_diffusers(config))
    expected = theirs(peer, schedule, 25, {key: value for key, value in config.items() if key != "_class_name"}, [5])
    assert (ours(peer, schedule, 25, [5]) - expected).abs().max() < TOLERANCE
