"""What a user asks the pipeline for, checked and spread out to one entry per picture."""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from numbers import Integral
from typing import Any

from torch import Tensor

from latentdiff.diffusion.guidance import Guidance
from latentdiff.diffusion.progress import Callback
from latentdiff.diffusion.samplers import Sampler, get_sampler
from latentdiff.diffusion.schedule import Level, Schedule
from latentdiff.engines.deepcache import CacheSettings
from latentdiff.errors import UsageError
from latentdiff.networks.config import VAEConfig
from latentdiff.prompts.tokenize import as_list

DEFAULT_BATCH_SIZE = 4

# What options are that were not given, and what they are in place of that with `fast`.
DEFAULTS: dict[str, Any] = {
    "steps": 25,
    "guidance_scale": 5.0,
    "sampler": "ddim",
    "cache_interval": 1,
    "cache_branch": 0,
}
FAST: dict[str, Any] = {"steps": 12, "sampler": "dpmpp-2m", "spacing": "trailing"}  # see tools/pareto.py


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """The options that making pictures has whatever the task; `Pipeline.__call__` says what each means.

    None is what `DEFAULTS` says, or with `fast` what `FAST` says.
    """

    negative_prompt: str | Sequence[str] = ""
    fast: bool = False
    steps: int | None = None
    guidance_scale: float | None = None
    guidance_rescale: float = 0.0
    guidance_interval: tuple[float, float] | None = None
    sampler: str | None = None
    eta: float = 0.0
    cache_interval: int | None = None
    cache_branch: int | None = None
    cache_centre: int | None = None
    seed: int | Sequence[int] | None = None
    num_images: int = 1
    batch_size: int | None = None
    spacing: str | None = None
    callback: Callback | None = None
    progress: bool = True

    def plan(self, prompt: str | Sequence[str], schedule: Schedule) -> Plan:
        """What these options mean for a prompt, or several, and the noise schedule of a model.

        Raises:
            UsageError: an option outside its domain.
        """
        own = self.settled()
        prompts, negatives = one_per_picture(prompt, own.negative_prompt, own.num_images)
        method = get_sampler(own.sampler, eta=own.eta)
        return Plan(
            options=own,
            prompts=prompts,
            negatives=negatives,
            seeds=seed_of_each(own.seed, len(prompts)),
            guidance=make_guidance(own.guidance_scale, own.guidance_rescale, own.guidance_interval),
            sampler=method,
            levels=method.levels(schedule, own.steps, own.spacing),
            start_scale=method.start_scale(schedule, own.spacing),
            parts=batches(len(prompts), own.batch_size),
            spacing=own.spacing or schedule.config.timestep_spacing,
            cache=CacheSettings(own.cache_interval, own.cache_branch, own.cache_centre),
        )

    def settled(self) -> Sampling:
        """The same with every option given that has a default."""
        return Sampling(**with_defaults({field.name: getattr(self, field.name) for field in fields(self)}))


def with_defaults(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options, some of them perhaps None, with the defaults in place of those; `fast` has done its work then."""
    defaults = {**DEFAULTS, **FAST} if options.get("fast") else DEFAULTS
    given = {name: value for name, value in options.items() if value is not None}
    return {**options, **defaults, **given, "fast": False}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is going to be done, checked, with one prompt, negative prompt and seed per picture."""

    options: Sampling
    prompts: list[str]
    negatives: list[str]
    seeds: list[int]
    guidance: Guidance
    sampler: Sampler
    levels: list[Level]  # from where the walk begins to the clean end
    start_scale: float  # of unit normal noise at the noisiest level
    parts: list[slice]  # the batches
    spacing: str | None
    cache: CacheSettings

    @property
    def steps(self) -> int:
        """How many steps each picture takes."""
        return len(self.levels) - 1

    def recipe_fields(self) -> Iterator[dict[str, Any]]:
        """For each picture, the fields of its recipe that the plan decides."""
        own = self.options
        same = {
            "steps": own.steps,
            "sampler": own.sampler,
            "eta": own.eta,
            "guidance_scale": own.guidance_scale,
            "guidance_rescale": own.guidance_rescale,
            "guidance_interval": own.guidance_interval,
            "spacing": self.spacing,
            "cache_interval": own.cache_interval,
            "cache_branch": own.cache_branch,
            "cache_centre": own.cache_centre,
        }
        for prompt, negative, seed in zip(self.prompts, self.negatives, self.seeds, strict=True):
            yield {"prompt": prompt, "negative_prompt": negative, "seed": seed, **same}


def one_per_picture(
    prompt: str | Sequence[str], negative_prompt: str | Sequence[str], num_images: int
) -> tuple[list[str], list[str]]:
    """Prompts and negative prompts, one of each per picture, all pictures of a prompt in a row.

    Raises:
        UsageError: nothing to make, or the two do not pair up.
    """
    prompts, negatives = as_list(prompt), as_list(negative_prompt)
    if len(negatives) == 1:
        negatives = negatives * len(prompts)
    if len(negatives) != len(prompts):
        raise UsageError(f"expected one negative prompt or {len(prompts)}, one for each prompt, found {len(negatives)}")
    if num_images < 1:
        raise UsageError(f"expected num_images of 1 or more, found {num_images}")
    return tuple([text for text in texts for _ in range(num_images)] for texts in (prompts, negatives))


def seed_of_each(seed: int | Sequence[int] | None, count: int) -> list[int]:
    """Seeds, one per picture: picture i has seed + i; a list is taken as it is, and None draws the first.

    Raises:
        UsageError: a list of another length.
    """
    if seed is None:
        seed = secrets.randbelow(2**32)
    if isinstance(seed, Integral):
        return [int(seed) + i for i in range(count)]
    if len(seed) != count:
        raise UsageError(f"expected one seed or {count}, one for each picture, found {len(seed)}")
    return [int(own) for own in seed]


def latent_shape(
    asked: tuple[int | None, int | None],
    trained: tuple[int, int],
    vae: VAEConfig,
    latents: Tensor | None,
    count: int,
) -> tuple[int, int, int]:
    """(C, h, w) of one picture's latents; sizes are (height, width) in pixels.

    What is asked for counts, else the size of the given `latents`, else that of the training.

    Raises:
        UsageError: a size that the VAE cannot make, or latents of another shape.
    """
    factor = vae.downscale
    given = (None, None) if latents is None else tuple(factor * side for side in latents.shape[-2:])
    size = [next(side for side in sides if side is not None) for sides in zip(asked, given, trained, strict=True)]
    for name, side in zip(("height", "width"), size, strict=True):
        if side <= 0 or side % factor:
            raise UsageError(f"expected a {name} that is a positive multiple of {factor}, found {side}")
    shape = (vae.latent_channels, size[0] // factor, size[1] // factor)
    if latents is not None and latents.shape != (count, *shape):
        raise UsageError(f"expected latents of shape {(count, *shape)}, found {tuple(latents.shape)}")
    return shape


def make_guidance(scale: float, rescale: float, interval: tuple[float, float] | None) -> Guidance:
    """The guidance; no interval is all noise levels.

    Raises:
        UsageError: a value outside its domain.
    """
    if interval is None:
        return Guidance(scale=scale, rescale=rescale)
    if not all(map(math.isfinite, interval)):
        raise UsageError(f"expected a guidance interval of two finite noise levels, found {interval}")
    return Guidance(scale=scale, rescale=rescale, interval=tuple(interval))


def batches(count: int, batch_size: int | None) -> list[slice]:
    """Cut `count` pictures into parts of at most `batch_size`.

    Raises:
        UsageError: a batch size below 1.
    """
    size = DEFAULT_BATCH_SIZE if batch_size is None else batch_size
    if size < 1:
        raise UsageError(f"expected a batch size of 1 or more, found {size}")
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]
