"""The noise schedule that a single file carries: `alphas_cumprod`, which original programs save with the weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from latentdiff.diffusion.config import BETA_SCHEDULES, ScheduleConfig
from latentdiff.diffusion.schedule import Schedule
from latentdiff.errors import CheckpointError, LatentDiffError

# Lin et al. 2023: the last timestep holds no signal, and sampling begins there.
ZERO_TERMINAL_SNR = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
_MARKER = "ztsnr"
_ROUNDING = 1e-3  # relative, of tables in half precision
_NO_SIGNAL = 1e-6  # what is left of zero in float32


def stored_schedule(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """What to change in a scheduler's configuration so that it has the schedule of the file; nothing if it says none.

    Raises:
        CheckpointError: the table is no schedule.
    """
    found = _alphas_cumprod(tensors)
    if found is None:
        return dict(ZERO_TERMINAL_SNR) if _MARKER in tensors else {}
    if found.numel() < 2 or not ((found >= 0) & (found <= 1)).all() or not (found.diff() <= 0).all():
        raise CheckpointError("the file's alphas_cumprod is no noise schedule: expected numbers that fall from 1 to 0")
    is_rescaled = _MARKER in tensors or float(found[-1]) < _NO_SIGNAL
    usual = ScheduleConfig(prediction_type="v_prediction", num_train_timesteps=len(found))
    for config in _candidates(usual, tensors.get("betas")):
        for rescaled in (False, True):
            if _agree(Schedule(replace(config, rescale_betas_zero_snr=rescaled)).alphas_cumprod, found):
                return _changes(config) | (ZERO_TERMINAL_SNR if rescaled or is_rescaled else {})
    if is_rescaled:
        return dict(ZERO_TERMINAL_SNR)
    previous = torch.cat([torch.ones(1, dtype=found.dtype), found[:-1]])
    return {"num_train_timesteps": len(found), "trained_betas": (1.0 - found / previous).tolist()}


def _alphas_cumprod(tensors: Mapping[str, Tensor]) -> Tensor | None:
    if (table := tensors.get("alphas_cumprod")) is not None and table.ndim == 1:
        return table.double()
    if (betas := tensors.get("betas")) is not None and betas.ndim == 1:
        return torch.cumprod(1.0 - betas.double(), dim=0)
    return None


def _candidates(usual: ScheduleConfig, betas: Tensor | None) -> list[ScheduleConfig]:
    """The schedule of Stable Diffusion, and the known forms between the ends of a table of betas."""
    configs = [usual]
    if betas is not None and betas.ndim == 1 and len(betas) == usual.num_train_timesteps:
        start, end = float(betas[0]), float(betas[-1])
        for form in BETA_SCHEDULES:
            try:
                configs.append(replace(usual, beta_schedule=form, beta_start=start, beta_end=end))
            except LatentDiffError:  # ends outside of what a schedule may have
                continue
    return configs


def _agree(ours: Tensor, theirs: Tensor) -> bool:
    return torch.allclose(ours, theirs, rtol=_ROUNDING, atol=_NO_SIGNAL)


def _changes(config: ScheduleConfig) -> dict[str, Any]:
    names = ("num_train_timesteps", "beta_schedule", "beta_start", "beta_end")
    default = ScheduleConfig()
    return {name: getattr(config, name) for name in names if getattr(config, name) != getattr(default, name)}
