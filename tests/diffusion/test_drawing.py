"""What a scheduler_config.json decides: sampler, spacing, thresholding, or a refusal; and that it is kept."""

from __future__ import annotations

import logging

import diffusers
import pytest
import torch

from latentdiff.diffusion.config import ScheduleConfig
from latentdiff.diffusion.drawing import Drawing, Thresholding
from latentdiff.diffusion.schedule import Schedule
from latentdiff.diffusion.thresholding import threshold
from latentdiff.errors import ConfigError, UsageError
from latentdiff.request.plan import Sampling
from tests import tiny

# A class of diffusers, its settings, and the sampler and spacing that draw as it does.
FOLDERS = [
    ("DDIMScheduler", {}, "ddim", "leading"),
    ("DDPMScheduler", {}, "ddpm", "leading"),
    ("PNDMScheduler", {"skip_prk_steps": True}, "pndm", "leading"),
    ("EulerDiscreteScheduler", {}, "euler", "linspace"),
    ("EulerDiscreteScheduler", {"use_karras_sigmas": True}, "euler", "karras"),
    ("EulerDiscreteScheduler", {"use_exponential_sigmas": True}, "euler", "exponential"),
    ("EulerDiscreteScheduler", {"use_beta_sigmas": True}, "euler", "beta"),
    ("EulerAncestralDiscreteScheduler", {"timestep_spacing": "trailing"}, "euler-a", "trailing"),
    ("HeunDiscreteScheduler", {}, "heun", "linspace"),
    ("KDPM2DiscreteScheduler", {}, "dpm2", "linspace"),
    ("KDPM2AncestralDiscreteScheduler", {}, "dpm2-a", "linspace"),
    ("LMSDiscreteScheduler", {}, "lms", "linspace"),
    ("DPMSolverMultistepScheduler", {}, "dpmpp-2m", "linspace"),
    ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}, "dpmpp-2m", "karras"),
    ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, "dpmpp-2m-sde", "linspace"),
    ("DPMSolverSinglestepScheduler", {}, "dpmpp-2s", None),
    ("UniPCMultistepScheduler", {}, "unipc", "linspace"),
    ("LCMScheduler", {}, "lcm", None),
    ("TCDScheduler", {}, "tcd", None),
]


def file_of(name: str, settings: dict) -> dict:
    """What diffusers saves for a scheduler of Stable Diffusion with these settings."""
    return dict(getattr(diffusers, name)(**tiny.BETAS, **settings).config) | {"_class_name": name}


def read(name: str, **settings) -> Drawing:
    return ScheduleConfig.from_diffusers({"_class_name": name, **settings}).drawing


@pytest.mark.parametrize(("name", "settings", "sampler", "spacing"), FOLDERS)
def test_a_folder_decides_sampler_and_spacing(name: str, settings: dict, sampler: str, spacing: str | None) -> None:
    schedule = Schedule(ScheduleConfig.from_diffusers(file_of(name, settings)))
    own = Sampling().for_model(schedule)
    assert (own.sampler, own.spacing) == (sampler, spacing)
    assert (own.steps, own.guidance_scale) == ((4, 1.0) if sampler in ("lcm", "tcd") else (25, 5.0))
    assert (own.sde_noise == "draws") is (sampler == "dpmpp-2m-sde")
    assert not schedule.config.drawing.refusal and Sampling().plan("", schedule).sampler.name == sampler


@pytest.mark.parametrize(("name", "settings", "sampler", "spacing"), FOLDERS)
def test_writing_keeps_class_and_keys(name: str, settings: dict, sampler: str, spacing: str | None) -> None:
    file = file_of(name, settings)
    assert ScheduleConfig.from_diffusers(file).to_diffusers() == file


def test_what_is_asked_for_counts_before_the_folder() -> None:
    schedule = Schedule(ScheduleConfig.from_diffusers(file_of("LCMScheduler", {})))
    own = Sampling(sampler="euler", steps=7, guidance_scale=3.0).for_model(schedule)
    assert (own.sampler, own.steps, own.guidance_scale) == ("euler", 7, 3.0)
    assert Sampling(fast=True).for_model(schedule).sampler == "dpmpp-2m"
    karras = Schedule(ScheduleConfig.from_diffusers(file_of("EulerDiscreteScheduler", {"use_karras_sigmas": True})))
    assert Sampling(spacing="simple").for_model(karras).spacing == "simple"
    assert Sampling(sampler="ddim").for_model(karras).spacing == "linspace"


def test_a_model_says_how_it_draws_best(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ScheduleConfig(prediction_type="v_prediction").with_drawing(Drawing.of_ours(guidance_scale=2.5, fast_steps=6))
    file = config.to_diffusers()
    again = ScheduleConfig.from_diffusers(file)
    assert again.to_diffusers() == file and not again.drawing.notes
    schedule = Schedule(again)
    assert Sampling().for_model(schedule).guidance_scale == 2.5
    assert Sampling(sampler="dpmpp-2m", fast=True).for_model(schedule).guidance_scale == 2.5
    assert Sampling(guidance_scale=7.0).for_model(schedule).guidance_scale == 7.0
    assert Sampling(fast=True).for_model(schedule).steps == 6
    assert Sampling(fast=True, steps=9).for_model(schedule).steps == 9
    assert Sampling().for_model(schedule).steps == 25
    assert Sampling(sampler="lcm").for_model(schedule).guidance_scale == 1.0, "which few steps need"
    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)  # to caplog
    peer = diffusers.DDIMScheduler.from_config(file)
    assert peer.config.prediction_type == "v_prediction" and not caplog.records, "it passes over the key in silence"


@pytest.mark.parametrize("value", [0, -1.0, "strong", True, float("inf"), float("nan")])
def test_a_senseless_guidance_is_refused(value: object) -> None:
    with pytest.raises(ConfigError, match="_guidance_scale must be a number above 0, found"):
        read("DDIMScheduler", _guidance_scale=value)


@pytest.mark.parametrize("value", [0, -1, 2.5, "few", True])
def test_a_senseless_number_of_steps_is_refused(value: object) -> None:
    with pytest.raises(ConfigError, match="_fast_steps must be a whole number from 1 on, found"):
        read("DDIMScheduler", _fast_steps=value)


def test_without_a_file_it_is_ddim() -> None:
    assert ScheduleConfig().drawing == Drawing()
    assert Sampling().for_model(Schedule(ScheduleConfig())).sampler == "ddim"
    assert ScheduleConfig().to_diffusers()["_class_name"] == "DDIMScheduler"


@pytest.mark.parametrize(
    ("name", "settings", "says"),
    [
        ("DEISMultistepScheduler", {}, "DEISMultistepScheduler, which is not here"),
        ("DPMSolverMultistepScheduler", {"solver_order": 3}, "solver_order 3"),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver"}, "algorithm_type 'dpmsolver'"),
        ("DPMSolverMultistepScheduler", {"solver_type": "heun"}, "solver_type 'heun'"),
        ("DPMSolverMultistepScheduler", {"final_sigmas_type": "sigma_min"}, "final_sigmas_type 'sigma_min'"),
        ("PNDMScheduler", {}, "skip_prk_steps False"),
        ("DDPMScheduler", {"variance_type": "fixed_large"}, "variance_type 'fixed_large'"),
        ("LCMScheduler", {"original_inference_steps": 100}, "original_inference_steps 100"),
    ],
)
def test_what_is_not_here_is_refused_by_name_and_only_where_it_is_needed(name: str, settings: dict, says: str) -> None:
    schedule = Schedule(ScheduleConfig.from_diffusers({"_class_name": name, **settings}))
    with pytest.raises(UsageError, match=says):
        Sampling().plan("", schedule)
    assert Sampling(sampler="ddim").plan("", schedule).sampler.name == "ddim"


@pytest.mark.parametrize(
    "config",
    [
        {"_class_name": "FlowMatchEulerDiscreteScheduler"},
        {"_class_name": "DPMSolverMultistepScheduler", "use_flow_sigmas": True},
        {"_class_name": "UniPCMultistepScheduler", "prediction_type": "flow_prediction"},
    ],
)
def test_flow_matching_is_refused(config: dict) -> None:
    with pytest.raises(ConfigError, match="flow matching"):
        ScheduleConfig.from_diffusers(config)


def test_unknown_keys_and_clip_sample_are_named() -> None:
    assert read("DDIMScheduler", frobnicate=3).notes == (
        "the scheduler has the unknown key 'frobnicate', which is left out of account",
    )
    assert "clip_sample" in read("DDIMScheduler", clip_sample=True).notes[0]
    assert read("DDIMScheduler", clip_sample=False).notes == ()


@pytest.mark.parametrize("most", [1.0, 2.5])
def test_thresholding_is_that_of_diffusers(most: float) -> None:
    config = {"thresholding": True, "sample_max_value": most, "dynamic_thresholding_ratio": 0.9}
    x0 = 2.0 * torch.randn(3, 4, 6, 6, generator=torch.Generator().manual_seed(0))
    expected = diffusers.DPMSolverMultistepScheduler(**config)._threshold_sample(x0)
    own = read("DPMSolverMultistepScheduler", **config)
    assert own.thresholding == Thresholding(ratio=0.9, most=most)
    assert own.thresholding_of("euler") is None
    torch.testing.assert_close(threshold(x0, own.thresholding_of("dpmpp-2m")), expected)


def test_senseless_thresholding_is_refused() -> None:
    with pytest.raises(ConfigError, match="thresholding with a ratio of 0 to 1"):
        read("DDIMScheduler", thresholding=True, dynamic_thresholding_ratio=2.0)
