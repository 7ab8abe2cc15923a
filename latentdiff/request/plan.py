"""What a user asks the pipeline for, checked and spread out to one entry per picture."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from latentdiff.diffusion.guidance import Guidance
from latentdiff.diffusion.samplers import Sampler, get_sampler
from latentdiff.diffusion.schedule import Level, Schedule
from latentdiff.engines.deepcache import CacheSettings
from latentdiff.errors import UsageError
from latentdiff.networks.config import VAEConfig
from latentdiff.networks.text_embedding import Reading
from latentdiff.prompts.syntax import read_prompt
from latentdiff.prompts.tokenize import as_list
from latentdiff.request.options import KEPT, OPTIONS, Settings


class Sampling(Settings):
    """The options that making images has whatever the task, checked, with defaults in place of what is not given."""

    def plan(self, prompt: str | Sequence[str], schedule: Schedule) -> Plan:
        """What these options mean for a prompt, or several, and the noise schedule of a model.

        Raises:
            UsageError: an option outside its domain.
        """
        prompts, negatives = one_per_picture(prompt, self.negative_prompt, self.num_images)
        method = get_sampler(self.sampler, eta=self.eta)
        return Plan(
            options=self,
            prompts=prompts,
            negatives=negatives,
            seeds=seed_of_each(self.seed, len(prompts)),
            guidance=make_guidance(self.guidance_scale, self.guidance_rescale, self.guidance_interval),
            sampler=method,
            levels=method.levels(schedule, self.steps, self.spacing),
            start_scale=method.start_scale(schedule, self.spacing),
            batches=batches(len(prompts), self.batch_size),
            spacing=self.spacing or schedule.config.timestep_spacing,
            cache=CacheSettings(self.cache_interval, self.cache_branch, self.cache_centre),
            reading=Reading(self.prompt_syntax, self.clip_skip),
        )


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
    batches: list[slice]  # which images are made at once
    spacing: str | None
    cache: CacheSettings
    reading: Reading

    @property
    def steps(self) -> int:
        """How many steps each picture takes."""
        return len(self.levels) - 1

    def rows(self, part: slice) -> int:
        """How many inputs the U-Net sees at once for a batch: each part of a prompt, and each negative prompt."""
        texts = self.prompts[part]
        return len(texts) + sum(len(read_prompt(text, self.reading.syntax).parts) for text in texts)

    def recipe_fields(self) -> Iterator[dict[str, Any]]:
        """For each picture, the fields of its recipe that the plan decides."""
        kept = {name: getattr(self.options, name) for name in KEPT}
        same = {**kept, "spacing": self.spacing}
        for prompt, negative, seed in zip(self.prompts, self.negatives, self.seeds, strict=True):
            yield {**same, "prompt": prompt, "negative_prompt": negative, "seed": seed}


def one_per_picture(
    prompt: str | Sequence[str], negative_prompt: str | Sequence[str], num_images: int
) -> tuple[list[str], list[str]]:
    """Prompts and negative prompts, one of each per picture, all pictures of a prompt in a row.

    Raises:
        UsageError: there is no prompt, or the two do not pair up.
    """
    prompts, negatives = as_list(prompt), as_list(negative_prompt)
    if len(negatives) == 1:
        negatives = negatives * len(prompts)
    if len(negatives) != len(prompts):
        raise UsageError(f"expected one negative prompt or {len(prompts)}, one for each prompt, found {len(negatives)}")
    return tuple([text for text in texts for _ in range(num_images)] for texts in (prompts, negatives))


def seed_of_each(seed: int | Sequence[int] | None, count: int) -> list[int]:
    """Seeds, one per image: image i has seed + i; a list is taken as it is, and None draws the first.

    Raises:
        UsageError: a list of another length.
    """
    if seed is None:
        seed = secrets.randbelow(2**32)
    if isinstance(seed, int):
        return [seed + i for i in range(count)]
    if len(seed) != count:
        raise UsageError(f"expected one seed or {count}, one for each image, found {len(seed)}")
    return list(seed)


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
    return Guidance(scale=scale, rescale=rescale, interval=tuple(interval))


def batches(count: int, batch_size: int | None) -> list[slice]:
    """Cut `count` images into parts of at most `batch_size`; None is the default."""
    size = OPTIONS["batch_size"].default if batch_size is None else batch_size
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]
