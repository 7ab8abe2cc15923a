"""The samplers by name.

To add one, write its step (and its levels, if they are its own) in a file of this folder and name it in `SAMPLERS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from latentdiff.diffusion.config import TIMESTEP_SPACINGS
from latentdiff.diffusion.denoise import Step
from latentdiff.diffusion.samplers import ddim, ddpm, dpmpp, euler, unipc
from latentdiff.diffusion.samplers.spacing import NOISE_SPACINGS
from latentdiff.diffusion.samplers.spacing import levels as noise_levels
from latentdiff.diffusion.schedule import Level, Schedule
from latentdiff.errors import UsageError

SPACINGS = (*TIMESTEP_SPACINGS, *NOISE_SPACINGS)


@dataclass(frozen=True)
class Sampler:
    """A step and the levels that it walks, both as the scheduler of the same name does it in diffusers."""

    name: str
    step: Step
    make_levels: Callable[[Schedule, int, str], list[Level]]
    make_start_scale: Callable[[Schedule, str], float] = lambda schedule, spacing: 1.0
    customary_spacing: str = "leading"  # where neither the caller nor the model's configuration names one
    whole_timesteps: bool = False  # what the model is told under the spacings that are even in noise

    def levels(self, schedule: Schedule, steps: int, spacing: str | None = None) -> list[Level]:
        """The `steps + 1` levels from the noisiest to the clean end.

        Raises:
            UsageError: `steps` is not in 1 to T, or the spacing is unknown.
        """
        spacing = self.spacing(schedule, spacing)
        if spacing not in SPACINGS:
            raise UsageError(f"spacing must be one of {', '.join(SPACINGS)}, found {spacing!r}")
        if spacing in NOISE_SPACINGS:
            return noise_levels(schedule, steps, spacing, whole_timesteps=self.whole_timesteps)
        return self.make_levels(schedule, steps, spacing)

    def start_scale(self, schedule: Schedule, spacing: str | None = None) -> float:
        """What unit normal noise is multiplied with to make the start latents."""
        return self.make_start_scale(schedule, self.spacing(schedule, spacing))

    def spacing(self, schedule: Schedule, spacing: str | None = None) -> str:
        """The spacing that applies: the one given, else that of the model's configuration, else what is customary."""
        return spacing or schedule.config.timestep_spacing or self.customary_spacing


SAMPLERS: dict[str, Sampler] = {
    sampler.name: sampler
    for sampler in (
        Sampler("ddim", ddim.step, Schedule.levels),
        Sampler("ddpm", ddpm.step, ddpm.levels),
        Sampler("euler", euler.step, euler.levels, euler.start_scale, "linspace"),
        Sampler("dpmpp-2m", dpmpp.step, dpmpp.levels, customary_spacing="linspace", whole_timesteps=True),
        Sampler("unipc", unipc.step, dpmpp.levels, customary_spacing="linspace", whole_timesteps=True),
    )
}


def get_sampler(name: str, *, eta: float = 0.0) -> Sampler:
    """The sampler of that name; `eta` in 0 to 1 is the share of fresh noise in DDIM's steps.

    Raises:
        UsageError: an unknown name, or an eta that is out of range or not for this sampler.
    """
    if name not in SAMPLERS:
        raise UsageError(f"sampler must be one of {', '.join(SAMPLERS)}, found {name!r}")
    if eta == 0.0:
        return SAMPLERS[name]
    if name != "ddim":
        raise UsageError(f"eta belongs to the ddim sampler, found eta {eta} with {name}; leave it at 0")
    if not 0.0 <= eta <= 1.0:
        raise UsageError(f"eta must lie in 0 to 1, found {eta}")
    return replace(SAMPLERS[name], step=partial(ddim.step, eta=eta))
