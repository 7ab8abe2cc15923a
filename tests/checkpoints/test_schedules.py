"""The schedule that a single file carries decides."""

from __future__ import annotations

import pytest
import torch

from latentdiff.checkpoints.schedules import ZERO_TERMINAL_SNR, stored_schedule
from latentdiff.diffusion.config import ScheduleConfig
from latentdiff.diffusion.schedule import Schedule
from latentdiff.errors import CheckpointError

V = {"prediction_type": "v_prediction"}


def table(**fields) -> torch.Tensor:
    return Schedule(ScheduleConfig(**V, **fields)).alphas_cumprod


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_the_usual_schedule_changes_nothing(dtype):
    assert stored_schedule({"alphas_cumprod": table().to(dtype)}) == {}
    assert stored_schedule({}) == {}


def test_zero_terminal_snr_by_table_and_by_marker():
    rescaled = table(rescale_betas_zero_snr=True).float()
    assert stored_schedule({"alphas_cumprod": rescaled}) == ZERO_TERMINAL_SNR
    assert stored_schedule({"ztsnr": torch.zeros(0)}) == ZERO_TERMINAL_SNR
    both = {"ztsnr": torch.zeros(0), "alphas_cumprod": table().float()}
    assert stored_schedule(both) == ZERO_TERMINAL_SNR


@pytest.mark.parametrize(
    "fields",
    [{"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}, {"beta_end": 0.02}, {"beta_start": 0.0015}],
)
def test_other_tables(fields):
    alphas = table(**fields)
    betas = 1 - alphas / torch.cat([torch.ones(1, dtype=torch.float64), alphas[:-1]])
    for tensors in ({"alphas_cumprod": alphas}, {"alphas_cumprod": alphas.float(), "betas": betas.float()}):
        config = ScheduleConfig.from_diffusers(ScheduleConfig(**V).to_diffusers() | stored_schedule(tensors))
        torch.testing.assert_close(Schedule(config).alphas_cumprod, alphas, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("wrong", [torch.linspace(0, 1, 10), torch.full((10,), 2.0), torch.full((10,), torch.nan)])
def test_what_is_no_schedule(wrong):
    with pytest.raises(CheckpointError, match="is no noise schedule"):
        stored_schedule({"alphas_cumprod": wrong})
