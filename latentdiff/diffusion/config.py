"""The configuration of a noise schedule, read from and written to diffusers' `scheduler_config.json`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

from latentdiff.diffusion.drawing import SILENT, SILENT_OF_CLASS, Drawing, read_drawing
from latentdiff.errors import ConfigError

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
BETA_SCHEDULES = ("scaled_linear", "linear", "squaredcos_cap_v2")
TIMESTEP_SPACINGS = ("leading", "trailing", "linspace")
LONGEST_TRAINING = 100_000  # timesteps; published models have 1,000
SMALLEST_BETA = 1e-12


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """The noise schedule and what the U-Net predicts. The defaults are those of Stable Diffusion 1.5."""

    num_train_timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: str = "scaled_linear"
    prediction_type: str = "epsilon"
    timestep_spacing: str | None = None  # leading, trailing or linspace; None: what is customary for each sampler
    steps_offset: int = 1  # added to every timestep of the leading spacing
    set_alpha_to_one: bool = False  # clean end: alpha_cumprod 1 (True) or that of timestep 0 (False, Stable Diffusion)
    trained_betas: tuple[float, ...] | None = None  # a table in place of beta_schedule and its ends
    rescale_betas_zero_snr: bool = False  # Lin et al. 2023: the last timestep holds no signal at all
    # How the model's authors draw, if the schedule was read from their file. No field: it is no part of the schedule itself.
    drawing = Drawing()

    def __post_init__(self) -> None:
        _check_number("num_train_timesteps", self.num_train_timesteps, 1, LONGEST_TRAINING, whole=True)
        _check_number("steps_offset", self.steps_offset, 0, self.num_train_timesteps, whole=True)
        _check_number("beta_start", self.beta_start, SMALLEST_BETA, 0.999)
        _check_number("beta_end", self.beta_end, SMALLEST_BETA, 0.999)
        for name in ("set_alpha_to_one", "rescale_betas_zero_snr"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"schedule {name} must be true or false, found {str(getattr(self, name))[:40]!r}")
        for name, choices in (
            ("beta_schedule", BETA_SCHEDULES),
            ("prediction_type", PREDICTION_TYPES),
            ("timestep_spacing", (*TIMESTEP_SPACINGS, None)),
        ):
            if not isinstance(value := getattr(self, name), str | None) or value not in choices:
                expected = ", ".join(map(str, choices))
                raise ConfigError(f"schedule {name} must be one of {expected}, found {str(value)[:40]!r}")
        if self.trained_betas is not None:
            _check_betas(self.trained_betas, self.num_train_timesteps)

    @classmethod
    def from_diffusers(cls, config: Mapping[str, Any]) -> Self:
        """Read a `scheduler_config.json`, whichever scheduler class wrote it; `drawing` is what it says of the sampler.

        Raises:
            ConfigError: the noise schedule is one that cannot be reproduced here.
        """
        silent = {**SILENT, **SILENT_OF_CLASS.get(str(config.get("_class_name")), {})}
        drawing = read_drawing(config, tuple(cls.__dataclass_fields__))
        entries = known_entries(cls, config, silent)
        if (betas := entries.get("trained_betas")) is not None:
            entries["trained_betas"] = tuple(betas) if isinstance(betas, list) else betas
        return cls(**entries).with_drawing(drawing)

    def with_drawing(self, drawing: Drawing) -> Self:
        """The same schedule, drawn from in another way."""
        other = replace(self)
        vars(other)["drawing"] = drawing
        return other

    def to_diffusers(self) -> dict[str, Any]:
        """A `scheduler_config.json` from which diffusers builds a scheduler with the same schedule.

        That which was read, with the entries that are different now; else a DDIMScheduler.
        """
        fields = {name: value for name in self.__dataclass_fields__ if (value := getattr(self, name)) is not None}
        file = dict(self.drawing.file)
        if "_class_name" not in file:
            return {"_class_name": "DDIMScheduler", "clip_sample": False, **file, **fields}
        before = type(self).from_diffusers(file)
        return file | {name: value for name, value in fields.items() if value != getattr(before, name)}


def _check_number(name: str, value: Any, low: float, high: float, *, whole: bool = False) -> None:
    kinds = int if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not low <= value <= high:
        kind = "a whole number" if whole else "a number"
        raise ConfigError(f"schedule {name} must be {kind} from {low} to {high}, found {str(value)[:40]!r}")


def _check_betas(betas: Any, count: int) -> None:
    if not isinstance(betas, tuple) or len(betas) != count:
        found = f"{len(betas)} entries" if isinstance(betas, tuple) else repr(betas)[:40]
        raise ConfigError(f"schedule trained_betas must be a list of {count} numbers, found {found}")
    if not all(isinstance(beta, int | float) and 0 <= beta <= 1 for beta in betas):
        raise ConfigError("schedule trained_betas must be numbers from 0 to 1")


def known_entries(cls: type, config: Mapping[str, Any], silent: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of `config` that are fields of `cls`; `silent` holds what diffusers assumes for missing ones."""
    values = {**silent, **{key: value for key, value in config.items() if value is not None}}
    return {key: value for key, value in values.items() if key in cls.__dataclass_fields__}
