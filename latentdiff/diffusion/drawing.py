"""What a `scheduler_config.json` says besides the noise schedule: with which sampler the model's authors draw, and how.

Every key is obeyed, or changes nothing here, or is named.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from latentdiff.errors import ConfigError

# diffusers' classes, and the samplers here that do the same.
CLASSES = {
    "DDIMScheduler": "ddim",
    "DDIMParallelScheduler": "ddim",
    "DDPMScheduler": "ddpm",
    "DDPMParallelScheduler": "ddpm",
    "PNDMScheduler": "pndm",
    "EulerDiscreteScheduler": "euler",
    "EulerAncestralDiscreteScheduler": "euler-a",
    "HeunDiscreteScheduler": "heun",
    "KDPM2DiscreteScheduler": "dpm2",
    "KDPM2AncestralDiscreteScheduler": "dpm2-a",
    "LMSDiscreteScheduler": "lms",
    "DPMSolverMultistepScheduler": "dpmpp-2m",
    "DPMSolverSinglestepScheduler": "dpmpp-2s",
    "DPMSolverSDEScheduler": "dpmpp-sde",
    "UniPCMultistepScheduler": "unipc",
    "LCMScheduler": "lcm",
    "TCDScheduler": "tcd",
}
# Where a file is silent, as those classes assume it; DDIM's come first.
SILENT: dict[str, Any] = {
    "beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear", "steps_offset": 0, "set_alpha_to_one": True,
}  # fmt: skip
_NARROW = {"beta_start": 0.00085, "beta_end": 0.012}
SILENT_OF_CLASS: dict[str, dict[str, Any]] = {
    "PNDMScheduler": {"set_alpha_to_one": False, "skip_prk_steps": False},
    "HeunDiscreteScheduler": _NARROW,
    "KDPM2DiscreteScheduler": _NARROW,
    "KDPM2AncestralDiscreteScheduler": _NARROW,
    "DPMSolverSDEScheduler": _NARROW,
    "LCMScheduler": {**_NARROW, "beta_schedule": "scaled_linear"},
    "TCDScheduler": {**_NARROW, "beta_schedule": "scaled_linear"},
}
SPACING_FLAGS = {
    "use_karras_sigmas": "karras",
    "use_exponential_sigmas": "exponential",
    "use_beta_sigmas": "beta",
    "use_lu_lambdas": "uniform-lambda",
}
OBEY_FLAGS = ("euler", "heun", "dpm2", "dpm2-a", "lms", "dpmpp-2m", "dpmpp-2m-sde", "dpmpp-2s", "dpmpp-sde", "unipc")
THRESHOLDS = ("ddim", "ddpm", "dpmpp-2m", "dpmpp-2m-sde", "dpmpp-2s", "unipc", "lcm")
NO_FLOW = "it is for flow matching, where a model predicts something else; expected a Stable Diffusion model"

# Keys that decide how a step is taken, and the values of them that are what is done here. None is always one.
DONE_HERE: dict[str, tuple[Any, ...]] = {
    "solver_order": (2,),
    "solver_type": ("midpoint", "bh2", "logrho"),
    "final_sigmas_type": ("zero",),
    "variance_type": ("fixed_small",),
    "interpolation_type": ("linear",),
    "timestep_type": ("discrete",),
    "skip_prk_steps": (True,),
    "original_inference_steps": (50,),
    "timestep_scaling": (10.0,),
    "predict_x0": (True,),
    "disable_corrector": ([],),
    "solver_p": (),
    "sigma_min": (),
    "sigma_max": (),
    "use_dynamic_shifting": (False,),
}
# Keys that change nothing here, and why.
WITHOUT_EFFECT = {
    "lower_order_final": "the last step is of first order anyway",
    "euler_at_final": "the last step is of first order anyway",
    "lambda_min_clipped": "it clips cosine schedules",
    "clip_sample_range": "it belongs to clip_sample",
    "flow_shift": "it belongs to flow matching",
    "time_shift_type": "it belongs to flow matching",
    "noise_sampler_seed": "noise comes from the seed of the image",
}
# Where models that were trained here say how they draw best. diffusers passes over keys that begin so.
GUIDANCE, FAST_STEPS = "_guidance_scale", "_fast_steps"
OF_FLOW = ("use_flow_sigmas", "use_flow", "base_shift", "max_shift", "shift_terminal", "invert_sigmas")
OF_THRESHOLDING = ("thresholding", "dynamic_thresholding_ratio", "sample_max_value")


@dataclass(frozen=True, kw_only=True)
class Thresholding:
    """Dynamic thresholding of the clean latents; see `thresholding`.

    ratio: the quantile of their absolute values at which they are clipped, 0 to 1.
    most: where that may lie at most, 1 or more; it is 1 at least.

    Raises:
        ConfigError: a value outside its domain.
    """

    ratio: float = 0.995
    most: float = 1.0

    def __post_init__(self) -> None:
        for value, low, high in ((self.ratio, 0.0, 1.0), (self.most, 1.0, math.inf)):
            if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
                raise ConfigError(
                    "expected thresholding with a ratio of 0 to 1 and a largest value of 1 or more, "
                    f"found {str(self.ratio)[:40]!r} and {str(self.most)[:40]!r}"
                )


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """How a model's authors draw with it.

    sampler: None if the file does not say.
    spacing: even in noise, of that sampler; None is what its schedule says.
    path_noise: whether the noise of a stochastic solver comes from Brownian paths, or from the next draws.
    steps, guidance_scale: what is customary for this model; None is what is for the sampler. A sampler for few steps comes
        before the model's guidance, unless that model is known by habit.
    habit: by what these are known, one line; "" if they are not.
    few_steps: the options with which a LoRA of the model draws in few steps; None if it has none.
    fast_steps: of how many steps the option `fast` makes an image without one; None is as many as for any model.
    tells_guidance: whether the U-Net is told the guidance scale, and is not evaluated without the prompt.
    refusal: why the sampler cannot be followed; "" if it can.
    notes: keys that are not obeyed, each with what it would do.
    """

    sampler: str | None = None
    spacing: str | None = None
    path_noise: bool = True
    steps: int | None = None
    guidance_scale: float | None = None
    habit: str = ""
    few_steps: Mapping[str, Any] | None = None
    fast_steps: int | None = None
    tells_guidance: bool = False
    thresholding: Thresholding | None = None
    refusal: str = ""
    notes: tuple[str, ...] = ()
    file: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)  # as it was read

    @classmethod
    def of_ours(cls, *, guidance_scale: float | None = None, fast_steps: int | None = None) -> Drawing:
        """That of a model that was trained here, whose file will say so much of it as is not None."""
        said = {GUIDANCE: guidance_scale, FAST_STEPS: fast_steps}
        file = {key: value for key, value in said.items() if value is not None}
        return cls(guidance_scale=guidance_scale, fast_steps=fast_steps, file=file)

    def thresholding_of(self, sampler: str) -> Thresholding | None:
        """The thresholding of x0 that a sampler obeys; for others diffusers has none."""
        return self.thresholding if sampler in THRESHOLDS else None


def read_drawing(config: Mapping[str, Any], known: tuple[str, ...]) -> Drawing:
    """Read a `scheduler_config.json`.

    Args:
        known: keys that are read elsewhere.

    Raises:
        ConfigError: the schedule is one of flow matching, or an entry is outside its domain.
    """
    name = _short(config["_class_name"]).strip("'") if config.get("_class_name") else None
    flows = [key for key in OF_FLOW if config.get(key)]
    if "FlowM" in str(name) or flows or config.get("prediction_type") == "flow_prediction":
        raise ConfigError(f"the scheduler is {name or 'unnamed'}{_with(flows)}: {NO_FLOW}")
    values = {**SILENT_OF_CLASS.get(str(name), {}), **config}
    sampler = CLASSES.get(str(name)) if name else None
    refusals = [] if sampler or not name else [f"the model's scheduler is {name}, which is not here"]
    algorithm = values.get("algorithm_type", "dpmsolver++")
    if sampler == "dpmpp-2m" and algorithm == "sde-dpmsolver++":
        sampler = "dpmpp-2m-sde"
    elif algorithm not in ("dpmsolver++", "deis"):
        refusals.append(f"the model's scheduler is {name} with algorithm_type {_short(algorithm)}, which is not here")
    for key, done in DONE_HERE.items():
        value = values.get(key)
        if value is not None and value not in done:
            refusals.append(f"the model's scheduler is {name} with {key} {_short(value)}, which is not here")
    spacing = next((own for flag, own in SPACING_FLAGS.items() if values.get(flag)), None)
    return Drawing(
        sampler=sampler,
        spacing=spacing if sampler in OBEY_FLAGS else None,
        path_noise=sampler != "dpmpp-2m-sde",
        guidance_scale=_guidance(config),
        fast_steps=_fast_steps(config),
        thresholding=_thresholding(values),
        refusal=next(iter(refusals), "") if name else "",
        notes=tuple(_notes(config, known)),
        file=dict(config),
    )


def _guidance(config: Mapping[str, Any]) -> float | None:
    value = config.get(GUIDANCE)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ConfigError(f"the scheduler's {GUIDANCE} must be a number above 0, found {_short(value)}")
    return float(value)


def _fast_steps(config: Mapping[str, Any]) -> int | None:
    value = config.get(FAST_STEPS)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise ConfigError(f"the scheduler's {FAST_STEPS} must be a whole number from 1 on, found {_short(value)}")
    return value


def _notes(config: Mapping[str, Any], known: tuple[str, ...]) -> list[str]:
    obeyed = {*known, *DONE_HERE, *SPACING_FLAGS, *OF_THRESHOLDING, *OF_FLOW, *WITHOUT_EFFECT, "algorithm_type"}
    obeyed |= {"trained_betas", "clip_sample"}
    strange = sorted(key for key in config if key not in obeyed and not key.startswith("_"))
    notes = [f"the scheduler has the unknown key {_short(key)}, which is left out of account" for key in strange[:3]]
    if config.get("clip_sample") is True:
        notes.append(
            "the scheduler's clip_sample is for pixels and is not applied to latents, as in diffusers' pipelines"
        )
    return notes


def _thresholding(values: Mapping[str, Any]) -> Thresholding | None:
    if not values.get("thresholding"):
        return None
    return Thresholding(ratio=values.get("dynamic_thresholding_ratio", 0.995), most=values.get("sample_max_value", 1.0))


def _short(value: Any) -> str:
    """A value of a file as a message may show it."""
    return repr(str(value)[:60]) if isinstance(value, str) else str(value)[:60]


def _with(keys: list[str]) -> str:
    return f" with {', '.join(keys)}" if keys else ""
