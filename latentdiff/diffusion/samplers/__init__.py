"""The samplers by name.

To add one, write its step (and its levels, if they are its own) in a file of this folder and name it in `SAMPLERS`.

A step may ask the denoiser more than once: at `level` first, then at `next_level` or at a level of its own between
the two, whose timestep the schedule tells (`Sampler.over` binds it). Previews and callbacks show the first answer;
`after_step` acts on what the step returns and never between its evaluations; DeepCache counts evaluations, in their
order, and `Sampler.calls` says beforehand how many there are. A pair that goes up in noise (Restart, RePaint) is a
draw from q(x_next | x): a step without an evaluation, which shows the answer before it and ends a solver's history. A
solver with a memory keeps it in `state` and starts again where guidance switches on or off.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

from torch import Tensor

from latentdiff.diffusion.config import TIMESTEP_SPACINGS
from latentdiff.diffusion.denoise import Noise, Step
from latentdiff.diffusion.parameterization import Denoiser
from latentdiff.diffusion.samplers import (
    ddim,
    ddpm,
    dpm2,
    dpmpp,
    dpmpp_2s,
    dpmpp_multistep_sde,
    dpmpp_sde,
    euler,
    euler_ancestral,
    heun,
    lcm,
    lms,
    pndm,
    restart,
    tcd,
    unipc,
)
from latentdiff.diffusion.samplers.churn import UNSTIRRED, Churn, churned
from latentdiff.diffusion.samplers.own_levels import own_levels
from latentdiff.diffusion.samplers.spacing import NOISE_SPACINGS
from latentdiff.diffusion.samplers.spacing import levels as noise_levels
from latentdiff.diffusion.schedule import Level, Schedule
from latentdiff.errors import UsageError

SPACINGS = (*TIMESTEP_SPACINGS, *NOISE_SPACINGS)


def as_it_is(t: float, spacing: str) -> float:
    """The model is told the timestep of the noise."""
    return t


def whole(t: float, spacing: str) -> float:
    """The model is told a whole timestep, as diffusers' multistep solvers do; they cut where they do not round."""
    return float(math.floor(t) if spacing in ("exponential", "beta") else round(t))


def whole_for_karras(t: float, spacing: str) -> float:
    """As diffusers' KDPM2 does."""
    return float(round(t)) if spacing == "karras" else t


def telling_whole(
    base: Step, denoiser: Denoiser, x: Tensor, level: Level, next_level: Level, state: Any, noise: Noise
) -> tuple[Tensor, Any]:
    """A step in which the model is told whole timesteps, the nearest ones."""
    return base(lambda x, at: denoiser(x, replace(at, t=float(round(at.t)))), x, level, next_level, state, noise)


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """A step and the levels that it walks, both as the scheduler of the same name does it in diffusers."""

    name: str
    step: Step
    make_levels: Callable[[Schedule, int, str], list[Level]] = ddpm.levels
    make_start_scale: Callable[[Schedule, str], float] = lambda schedule, spacing: 1.0
    customary_spacing: str = "leading"  # where neither the caller nor the model's configuration names one
    ignores_model: bool = False  # of the spacing: the customary one counts whatever the model's configuration says
    told: Callable[[float, str], float] = as_it_is  # the timestep under the spacings that are even in noise
    end: Callable[[Schedule], Level] | None = None  # of the walk under those; None is free of noise
    repeats: bool = False  # walk the last stretch again; see `restart`
    eta: float | None = None  # the share of fresh noise that is customary; None has no choice
    scales_noise: bool = False  # has `s_noise`
    churns: bool = False  # has `s_churn`
    asks_schedule: bool = False  # the step evaluates at levels of its own, whose timesteps the schedule tells
    evaluations: int = 1  # of the model, in a step that does not end free of noise
    first_evaluations: int = 1  # in the first step, if more
    customary_steps: int | None = None  # and the guidance scale, where they differ from those of all
    customary_guidance: float | None = None
    churn: Churn = UNSTIRRED

    def levels(
        self,
        schedule: Schedule,
        steps: int,
        spacing: str | None = None,
        *,
        rho: float | None = None,
        discard_penultimate: bool = False,
        within: str | None = None,
        told: str | None = None,
    ) -> list[Level]:
        """The levels from the noisiest to the clean end, `steps + 1` but for what the spacing's docstring says.

        Args:
            rho: see `spacing.levels`.
            told: see `over`.
            discard_penultimate: take one step more, and leave out the last level before the end.
            within: a spacing in timesteps that bounds one in noise, as diffusers' single-step solvers have it.

        Raises:
            UsageError: `steps` is not in 1 to T, or the spacing is unknown, or has no rho.
        """
        spacing = self.spacing(schedule, spacing)
        if spacing not in SPACINGS:
            raise UsageError(f"spacing must be one of {', '.join(SPACINGS)}, found {spacing!r}")
        times, again = restart.repeats(steps) if self.repeats else (0, 0)
        asked = steps - times * again + discard_penultimate
        if spacing in NOISE_SPACINGS:
            ends = None
            if within and self.make_levels is euler.levels:
                first, *_, last, _ = [*self.make_levels(schedule, max(asked, 2), within)]
                ends = first, last
            own = partial(self.told, spacing=spacing)
            levels = noise_levels(schedule, asked, spacing, told=float if told else own, rho=rho, ends=ends)
            if self.end and self.end(schedule).alpha_cumprod > levels[-2].alpha_cumprod:
                levels = [*levels[:-1], self.end(schedule)]
        elif rho is not None:
            raise UsageError(f"rho belongs to spacings that are even in noise, found {rho} with {spacing}")
        else:
            levels = self.make_levels(schedule, asked, spacing)
        if discard_penultimate:
            levels = [*levels[:-2], levels[-1]]
        return restart.with_repeats(schedule, levels, times, again) if times else levels

    def own_levels(
        self, schedule: Schedule, *, sigmas: Sequence[float] | None = None, timesteps: Sequence[float] | None = None
    ) -> list[Level]:
        """The levels of a walk that the caller chooses; see `own_levels`."""
        end = self.make_levels(schedule, 1, "leading")[-1]
        return own_levels(schedule, end, sigmas=sigmas, timesteps=timesteps)

    def start_scale(
        self,
        schedule: Schedule,
        spacing: str | None = None,
        first: Level | None = None,
        *,
        within: str | None = None,
    ) -> float:
        """What unit normal noise is multiplied with to make the start latents.

        Args:
            first: where the walk begins, if it is not the noisiest level of the schedule.
            within: see `levels`; the scale goes by it then.
        """
        scale = self.make_start_scale(schedule, within or self.spacing(schedule, spacing))
        begins_lower = first is not None and first.t < schedule.num_train_timesteps - 2
        return first.sigma if begins_lower and scale != 1.0 else scale

    def spacing(self, schedule: Schedule, spacing: str | None = None) -> str:
        """The spacing that applies: the one given, else that of the model's configuration, else what is customary."""
        of_model = None if self.ignores_model else schedule.config.timestep_spacing
        return spacing or of_model or self.customary_spacing

    def over(self, schedule: Schedule, steps: int, told: str | None = None) -> Sampler:
        """The same with a step that knows what it has to know of the schedule and of the number of steps.

        Args:
            told: the timestep that the model is told of a noise level between two: "exact", that in between, or "whole",
                the nearest one; None is as diffusers' scheduler of this name has it.
        """
        finite = schedule.with_finite_log_snr()
        step = partial(self.step, schedule=finite) if self.asks_schedule else self.step
        if self.churn.amount:
            step = partial(churned, step, churn=self.churn, steps=steps, schedule=finite)
        if told == "whole":
            step = partial(telling_whole, step)
        return replace(self, step=step, asks_schedule=False, churn=UNSTIRRED)

    def calls(self, levels: Sequence[Level]) -> int:
        """How often a walk over `levels` asks the model."""
        down = [after for before, after in pairwise(levels) if after.alpha_cumprod > before.alpha_cumprod]
        calls = sum(self.evaluations if level.sigma > 0.0 else 1 for level in down)
        return calls + (self.first_evaluations - 1 if len(down) > 1 else 0)


_EULER = {"make_levels": euler.levels, "make_start_scale": euler.start_scale, "customary_spacing": "linspace"}
_MULTISTEP = {"make_levels": dpmpp.levels, "customary_spacing": "linspace", "told": whole}
_ANCESTRAL = {"eta": 1.0, "scales_noise": True}
_TWICE = {"asks_schedule": True, "evaluations": 2}
_CONSISTENCY = {"customary_spacing": "lcm", "ignores_model": True, "customary_steps": 4, "customary_guidance": 1.0}

SAMPLERS: dict[str, Sampler] = {
    sampler.name: sampler
    for sampler in (
        Sampler(name="ddim", step=ddim.step, make_levels=Schedule.levels, eta=0.0),
        Sampler(name="ddpm", step=ddpm.step),
        Sampler(name="euler", step=euler.step, churns=True, **_EULER),
        Sampler(name="dpmpp-2m", step=dpmpp.step, **_MULTISTEP),
        Sampler(name="unipc", step=unipc.step, **_MULTISTEP),
        Sampler(name="euler-a", step=euler_ancestral.step, **_ANCESTRAL, **_EULER),
        Sampler(name="heun", step=heun.step, churns=True, evaluations=2, **_EULER),
        Sampler(name="dpm2", step=dpm2.step, churns=True, told=whole_for_karras, **_TWICE, **_EULER),
        Sampler(
            name="dpm2-a", step=partial(dpm2.step, eta=1.0), told=whole_for_karras, **_TWICE, **_ANCESTRAL, **_EULER
        ),
        Sampler(name="lms", step=lms.step, **_EULER),
        Sampler(name="dpmpp-2s", step=dpmpp_2s.alternating_step, **_MULTISTEP),
        Sampler(name="dpmpp-2s-a", step=dpmpp_2s.step, **_TWICE, **_ANCESTRAL, **_EULER),
        Sampler(name="dpmpp-sde", step=dpmpp_sde.step, **_TWICE, **_ANCESTRAL, **_EULER),
        Sampler(name="dpmpp-2m-sde", step=dpmpp_multistep_sde.step, **_ANCESTRAL, **_MULTISTEP),
        Sampler(name="dpmpp-3m-sde", step=partial(dpmpp_multistep_sde.step, order=3), **_ANCESTRAL, **_MULTISTEP),
        Sampler(name="pndm", step=pndm.step, make_levels=pndm.levels, asks_schedule=True, first_evaluations=2),
        Sampler(name="lcm", step=lcm.step, **_CONSISTENCY),
        Sampler(name="tcd", step=tcd.step, make_levels=tcd.levels, end=tcd.end, eta=0.3, asks_schedule=True, **_CONSISTENCY),
        Sampler(
            name="restart", step=restart.step, repeats=True, scales_noise=True, evaluations=2,
            **{**_EULER, "customary_spacing": "karras"},
        ),
    )
}  # fmt: skip


def get_sampler(
    name: str,
    *,
    eta: float | None = None,
    s_noise: float = 1.0,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    sde_noise: str | None = None,
) -> Sampler:
    """The sampler of that name.

    Args:
        eta: 0 to 1, the share of fresh noise in the steps; None is what is customary.
        s_noise: what the noise of the steps is multiplied with.
        s_churn, s_tmin, s_tmax: fresh noise before the steps of an ODE solver; see `Churn`.
        sde_noise: "path" or "draws", where the noise of the multistep SDE solvers comes from; None is the path.

    Raises:
        UsageError: an unknown name, or an option that is out of range or not for this sampler.
    """
    if name not in SAMPLERS:
        raise UsageError(f"sampler must be one of {', '.join(SAMPLERS)}, found {name!r}")
    sampler, step = SAMPLERS[name], {}
    if eta is not None and (eta or sampler.eta is not None):
        if sampler.eta is None:
            takes = ", ".join(one.name for one in SAMPLERS.values() if one.eta is not None)
            raise UsageError(f"eta belongs to the samplers {takes}; found eta {eta} with {name}; leave it at 0")
        if not 0.0 <= eta <= 1.0:
            raise UsageError(f"eta must lie in 0 to 1, found {eta}")
        step["eta"] = eta
    churn = UNSTIRRED
    if (s_churn, s_tmin, s_tmax) != (0.0, 0.0, math.inf):
        churn = Churn(amount=s_churn, low=s_tmin, high=s_tmax, s_noise=s_noise)
    if churn.amount and not sampler.churns:
        takes = ", ".join(one.name for one in SAMPLERS.values() if one.churns)
        raise UsageError(f"s_churn belongs to the samplers {takes}; found {s_churn} with {name}; leave it at 0")
    if s_noise != 1.0:
        if not 0.0 <= s_noise < math.inf:
            raise UsageError(f"s_noise must be a finite number of 0 or more, found {s_noise}")
        if sampler.scales_noise:
            step["s_noise"] = s_noise
        elif not churn.amount:
            raise UsageError(f"s_noise scales the noise of stochastic steps; {name} draws none; leave it at 1")
    if sde_noise == "draws":
        if name not in ("dpmpp-2m-sde", "dpmpp-3m-sde"):
            raise UsageError(f"sde_noise belongs to dpmpp-2m-sde and dpmpp-3m-sde, found it with {name}; leave it out")
        step["brownian"] = False
    return replace(sampler, step=partial(sampler.step, **step) if step else sampler.step, churn=churn)
