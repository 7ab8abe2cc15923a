"""The second pass of an image at a larger size: its options, its levels, and how latents grow.

A pass takes all of its steps, from the level that a walk of steps / strength steps has there, as AUTOMATIC1111's
"Hires. fix" does; its noise is that of the same seed, drawn again at the new size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, Self, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from latentdiff.checkpoints.hashing import place_hash
from latentdiff.diffusion.schedule import Level, Schedule
from latentdiff.errors import UsageError
from latentdiff.request.options import OPTIONS, SECOND_PASS, UpscalerName, check_second_pass
from latentdiff.request.plan import Plan

# How latents are enlarged: torch's mode, and whether it is antialiased. Other upscalers work on pixels.
LATENT_MODES = {
    "latent": ("bilinear", False),
    "latent-antialiased": ("bilinear", True),
    "latent-bicubic": ("bicubic", False),
    "latent-bicubic-antialiased": ("bicubic", True),
    "latent-nearest": ("nearest", False),
    "latent-nearest-exact": ("nearest-exact", False),
}
_LARGEST_STRENGTH = 0.999


@dataclass(frozen=True)
class SecondPass:
    """What is asked for; the fields are options of `GenerateOptions`."""

    hires: float
    hires_upscaler: str
    hires_strength: float
    hires_steps: int | None

    @classmethod
    def taken_from(cls, options: dict[str, Any]) -> Self | None:
        """The second pass that options ask for, which are taken out of them; None if they ask for none.

        Raises:
            UsageError: something is said of a second pass that there is not.
        """
        given = {name: options.pop(name, None) for name in SECOND_PASS}
        check_second_pass(given)
        if given["hires"] is None:
            return None
        return cls(**{name: OPTIONS[name].default if value is None else value for name, value in given.items()})

    @property
    def is_by_file(self) -> bool:
        """Whether a network enlarges."""
        return self.hires_upscaler not in get_args(UpscalerName)

    def fields(self) -> dict[str, Any]:
        """What a recipe holds of it; a file by its name, and as a source."""
        if not self.is_by_file:
            return dict(vars(self))
        path = Path(self.hires_upscaler)
        entry = {"file": path.name, "sha256": place_hash(path)}
        return {**vars(self), "hires_upscaler": path.name, "sources": {"hires_upscaler": entry}}

    def size(self, height: int, width: int, factor: int) -> tuple[int, int]:
        """Height and width of the latents for an image of this size in pixels, whose VAE has this factor."""
        return int(height * self.hires) // factor, int(width * self.hires) // factor

    def plan(self, plan: Plan, schedule: Schedule) -> Plan:
        """The walk of the second pass.

        Raises:
            UsageError: there is nothing to walk, or more than the schedule has.
        """
        if plan.options.sigmas or plan.options.timesteps:
            raise UsageError("hires takes its levels from a spacing; leave sigmas and timesteps out")
        taken = self.hires_steps or plan.options.steps
        strength = min(self.hires_strength, _LARGEST_STRENGTH)
        own = replace(plan.options, steps=max(taken, int(taken / strength)))
        method = own.method()
        levels = last_steps(own.levels(method, schedule), taken)
        sampler = method.over(schedule, len(levels) - 1, own.told_timesteps)
        return replace(plan, levels=levels, sampler=sampler)


def enlarged_latents(latents: Tensor, upscaler: str, size: tuple[int, int]) -> Tensor:
    """Latents (N, C, h, w) at another height and width, by one of `LATENT_MODES`."""
    mode, antialias = LATENT_MODES[upscaler]
    return F.interpolate(latents, size=size, mode=mode, antialias=antialias)


def noised(latents: Tensor, noise: Tensor, level: Level) -> Tensor:
    """Clean latents and unit normal noise at a level."""
    return torch.add(level.alpha * latents, noise, alpha=level.sigma)


def last_steps(levels: Sequence[Level], taken: int) -> list[Level]:
    """The levels of the last steps of a walk; of one that goes up in noise again, those of its first way down count, and
    what lies above the new start is not walked."""
    falling = first_way_down(levels)
    start = falling[len(falling) - 1 - taken]
    return [level for level in levels[start:] if level.alpha_cumprod >= levels[start].alpha_cumprod]


def first_way_down(levels: Sequence[Level]) -> list[int]:
    """The places of a walk's levels without the stretches that it walks again."""
    if all(after.alpha_cumprod >= before.alpha_cumprod for before, after in pairwise(levels)):
        return list(range(len(levels)))
    lowest = [-math.inf, *accumulate((level.alpha_cumprod for level in levels), max)]
    return [place for place, level in enumerate(levels) if level.alpha_cumprod > lowest[place]]
