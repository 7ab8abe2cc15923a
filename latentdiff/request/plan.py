"""What a user asks the pipeline for, checked and spread out to one entry per image."""

from __future__ import annotations

import math
import secrets
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import groupby
from typing import Any

from torch import Tensor

from latentdiff.diffusion.drawing import Thresholding
from latentdiff.diffusion.guidance import EVERYWHERE, UNGUIDED, Guidance
from latentdiff.diffusion.guidance_kinds import CFG_PP_SAMPLERS, Projection, Weakening
from latentdiff.diffusion.latents import NoiseRule
from latentdiff.diffusion.samplers import SAMPLERS, Sampler, get_sampler
from latentdiff.diffusion.schedule import Level, Schedule
from latentdiff.engines.deepcache import UNCACHED, CacheSettings
from latentdiff.errors import UsageError
from latentdiff.networks.sizes import SizeOptions, Told
from latentdiff.networks.text_embedding import Reading
from latentdiff.prompts.syntax import as_list, read_prompt
from latentdiff.prompts.tags import LoRATag
from latentdiff.recipe import recorded_steering
from latentdiff.request.calls import Settings
from latentdiff.request.options import KEPT, SAMPLING, SamplerName

TOLD_GUIDANCE = 8.5  # customary for models that are told it (Luo et al. 2023)


class Sampling(Settings):
    """The options that making images has whatever the task, checked, with defaults in place of what is not given."""

    def plan(self, prompt: str | Sequence[str], schedule: Schedule) -> Plan:
        """What these options mean for a prompt, or several, and the noise schedule of a model.

        Raises:
            UsageError: an option outside its domain.
        """
        own, drawing = self.for_model(schedule), schedule.config.drawing
        if own.fast and own.guidance_scale == 1.0 and any(as_list(own.negative_prompt)):
            warnings.warn(
                "the model's LoRA for few steps needs no guidance, and without it the negative prompt does nothing; give"
                " guidance_scale 1.5, or leave out fast",
                stacklevel=2,
            )
        if (habit := drawing.habit) and self.left_open & {"steps", "guidance_scale"}:
            warnings.warn(habit, stacklevel=2)
        if own.cache_interval > 1 and (deep := "ControlNets" if own.controls else own.taps()):
            raise UsageError(
                f"{deep} act on layers that a cache leaves out; leave cache_interval at 1, found {own.cache_interval}"
            )
        prompts, negatives = one_per_image(prompt, own.negative_prompt, own.num_images)
        method = own.method()
        levels = own.levels(method, schedule)
        return Plan(
            options=own,
            prompts=prompts,
            negatives=negatives,
            seeds=seed_of_each(own.seed, len(prompts)),
            guidance=own.guidance(tells=drawing.tells_guidance),
            sampler=method.over(schedule, len(levels) - 1, own.told_timesteps),
            levels=levels,
            start_scale=own.start_scale(method, schedule, levels[0]),
            noise=own.noise_rule(),
            batches=batches_of_equal_loras(prompts, own.prompt_syntax, own.batch_size),
            spacing=own.spacing,
            cache=UNCACHED
            if own.cache_interval == 1
            else CacheSettings(own.cache_interval, own.cache_branch, own.cache_centre),
            reading=Reading(own.prompt_syntax, own.clip_skip),
            thresholding=drawing.thresholding_of(own.sampler) if drawing.thresholding else None,
            sizes=SizeOptions(**{field.name: getattr(own, field.name) for field in fields(SizeOptions)}),
        )

    def for_model(self, schedule: Schedule) -> Sampling:
        """The same with what is left open decided as a model's authors do, and as is customary for the sampler.

        Raises:
            UsageError: the authors' sampler is not here and none is asked for, or options exclude one another.
        """
        drawing, few = schedule.config.drawing, schedule.config.drawing.few_steps
        if self.fast and few and few.keys() - self.given.keys():
            return self.but(**{**few, **self.given}).for_model(schedule)
        changes: dict[str, Any] = {"fast": bool(self.fast and few)}  # from here on: whether the model's LoRA acts
        if "sampler" in self.left_open:
            if drawing.refusal:
                raise UsageError(f"{drawing.refusal}; ask for a sampler, ddim say, to draw otherwise than its authors do")
            changes["sampler"] = drawing.sampler or self.sampler
        name = changes.get("sampler", self.sampler)
        sampler = SAMPLERS[name]
        steps = drawing.steps or sampler.customary_steps
        theirs = drawing.guidance_scale or (TOLD_GUIDANCE if drawing.tells_guidance else None)
        # Samplers for few steps want their own, unless the model is made for these.
        of_sampler = None if drawing.habit or drawing.tells_guidance else sampler.customary_guidance
        customary = {"steps": steps, "guidance_scale": of_sampler or theirs or sampler.customary_guidance}
        changes |= {key: value for key, value in customary.items() if value is not None and key in self.left_open}
        is_theirs = name == drawing.sampler
        if self.sde_noise is None and is_theirs and not drawing.path_noise:
            changes["sde_noise"] = "draws"
        if self.fast and not few and drawing.fast_steps and "steps" not in self.given:
            changes["steps"] = drawing.fast_steps
        own = self.sigmas or self.timesteps
        if own:
            changes["steps"] = self._own_steps()
        elif self.spacing is None:
            of_model = None if sampler.ignores_model else schedule.config.timestep_spacing
            changes["spacing"] = (drawing.spacing if is_theirs else None) or of_model
        return self.decided(changes)

    def guidance(self, *, tells: bool) -> Guidance:
        """How the prompt is emphasized by a second evaluation; not at all where the U-Net is told the scale.

        Raises:
            UsageError: something is to be avoided there, or guidance shaped.
        """
        if not tells:
            if self.guidance_kind == "cfg++" and self.sampler not in CFG_PP_SAMPLERS:
                raise UsageError(f"cfg++ goes with {', '.join(CFG_PP_SAMPLERS)}, found the sampler {self.sampler}")
            return Guidance(
                scale=self.guidance_scale,
                rescale=self.guidance_rescale,
                interval=self.guidance_interval or EVERYWHERE,
                kind=self.guidance_kind,
                projection=Projection(self.apg_eta, self.apg_bound, self.apg_momentum),
                percentile=self.threshold_percentile,
                weakening=self.weakening(),
            )
        if (
            self.guidance_rescale
            or self.guidance_interval
            or self.guidance_kind != "cfg"
            or self.weakening()
            or any(as_list(self.negative_prompt))
        ):
            raise UsageError(
                "this model is told the guidance scale and is not evaluated without the prompt; leave out negative "
                "prompt, guidance kind, rescale and interval, and pag or seg"
            )
        return UNGUIDED

    def weakening(self) -> Weakening | None:
        """What is led away from besides the negative prompt.

        Raises:
            UsageError: two of them.
        """
        if self.pag_scale and self.seg_scale:
            raise UsageError(
                f"expected pag_scale or seg_scale, found both, {self.pag_scale:g} and {self.seg_scale:g}; leave one at 0"
            )
        if self.seg_scale:
            return Weakening(self.seg_scale, math.inf if self.seg_blur is None else self.seg_blur)
        return Weakening(self.pag_scale) if self.pag_scale else None

    def taps(self) -> str:
        """The name of what is put on modules in the middle of the U-Net, if anything is."""
        return "PAG and SEG" if self.weakening() else "FreeU's factors" if self.freeu else ""

    def _own_steps(self) -> int:
        """The number of steps over levels that the caller wrote down.

        Raises:
            UsageError: they are given twice, or with what decides the levels otherwise.
        """
        excluded = {name: getattr(self, name) for name in ("spacing", "rho", "discard_penultimate")}
        excluded["timesteps"] = self.timesteps if self.sigmas else None
        for name, value in excluded.items():
            if value:
                raise UsageError(
                    f"sigmas or timesteps are the levels to visit, found {name} {value!r} as well; drop one"
                )
        count = len(self.timesteps) if self.timesteps else sum(sigma > 0.0 for sigma in self.sigmas)
        if "steps" not in self.left_open and self.steps != count:
            raise UsageError(f"expected steps {count}, as many as levels are given, found {self.steps}; drop steps")
        return count

    def method(self) -> Sampler:
        """The sampler with its options.

        Raises:
            UsageError: an option that is not for this sampler.
        """
        return get_sampler(
            self.sampler,
            eta=self.eta,
            s_noise=self.s_noise,
            s_churn=self.s_churn,
            s_tmin=self.s_tmin,
            s_tmax=math.inf if self.s_tmax is None else self.s_tmax,
            sde_noise=self.sde_noise,
        )

    def levels(self, method: Sampler, schedule: Schedule) -> list[Level]:
        """The levels that are visited, and the clean end."""
        if self.sigmas or self.timesteps:
            return method.own_levels(schedule, sigmas=self.sigmas, timesteps=self.timesteps)
        return method.levels(
            schedule,
            self.steps,
            self.spacing,
            rho=self.rho,
            discard_penultimate=self.discard_penultimate,
            within=self.within(schedule),
            told=self.told_timesteps,
        )

    def noise_rule(self) -> NoiseRule:
        """How the noise of an image follows from its seed.

        Raises:
            UsageError: a place in a batch, where none is shared.
        """
        if self.noise_index and self.noise_source != "comfy":
            raise UsageError(
                f"noise_index belongs to the noise of comfy, found {self.noise_index} with {self.noise_source}; leave it at 0"
            )
        return NoiseRule(self.noise_source, self.noise_index, self.seed_delta)

    def start_scale(self, method: Sampler, schedule: Schedule, first: Level) -> float:
        """What unit normal noise is multiplied with to make the start latents."""
        if self.noise_start is not None:
            return first.sigma if self.noise_start == "sigma" else 1.0
        return method.start_scale(schedule, self.spacing, first, within=self.within(schedule))

    def within(self, schedule: Schedule) -> str | None:
        """The spacing in timesteps within which the model's authors have theirs in noise, if that is what is asked for."""
        drawing = schedule.config.drawing
        is_theirs = self.sampler == drawing.sampler and self.spacing == drawing.spacing
        return schedule.config.timestep_spacing if is_theirs and drawing.spacing else None


@dataclass(frozen=True)
class Start:
    """Where a batch of images begins, and what else its walk needs."""

    x: Tensor  # (N, C, h, w), at the first level
    after_step: Callable[[Tensor, Level], Tensor] | None = None  # see `denoise`
    extra_channels: Tensor | None = None  # see `Pipeline.denoiser`
    told: Told | None = None  # what the U-Net is told beside the text, where that is not the size of the image


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is going to be done, checked, with one prompt, negative prompt and seed per image."""

    options: Sampling
    prompts: list[str]
    negatives: list[str]
    seeds: list[int]
    guidance: Guidance
    sampler: Sampler
    levels: list[Level]  # from where the walk begins to the clean end
    start_scale: float  # of unit normal noise at the noisiest level
    noise: NoiseRule
    batches: list[slice]  # which images are made at once
    spacing: str | None
    cache: CacheSettings
    reading: Reading
    thresholding: Thresholding | None = None
    sizes: SizeOptions = SizeOptions()
    around: str = ""  # axes along which the edges continue at the other side

    @property
    def steps(self) -> int:
        """How many steps each image takes."""
        return len(self.levels) - 1

    def rows(self, part: slice) -> int:
        """How many inputs the U-Net sees at once for a batch: each part of a prompt, each negative prompt, and that without
        the image that guidance leads away from."""
        others = 1 + (self.guidance.image_scale != 1.0)
        return sum(others + len(read_prompt(text, self.reading.syntax).parts) for text in self.prompts[part])

    def pieces(self) -> list[tuple[int, Plan]]:
        """The plan cut where the prompts name other LoRAs; each piece with the place of its first image."""
        found: list[tuple[int, Plan]] = []
        for _, some in groupby(self.batches, key=lambda part: self._loras(part.start)):
            parts = list(some)
            first, last = parts[0].start, parts[-1].stop
            piece = replace(
                self,
                prompts=self.prompts[first:last],
                negatives=self.negatives[first:last],
                seeds=self.seeds[first:last],
                batches=[slice(part.start - first, part.stop - first) for part in parts],
            )
            found.append((first, piece))
        return found

    @property
    def loras(self) -> tuple[LoRATag, ...]:
        """What the prompts of a piece name."""
        return self._loras(0)

    def _loras(self, image: int) -> tuple[LoRATag, ...]:
        return read_prompt(self.prompts[image], self.reading.syntax).loras

    def recipe_fields(self) -> Iterator[dict[str, Any]]:
        """For each image, the fields of its recipe that the plan decides."""
        kept = {name: getattr(self.options, name) for name in KEPT if name in SAMPLING}
        same = {**kept, "spacing": self.spacing, **recorded_steering(vars(self.options))}
        for prompt, negative, seed in zip(self.prompts, self.negatives, self.seeds, strict=True):
            yield {**same, "prompt": prompt, "negative_prompt": negative, "seed": seed}


def customary_guidance(schedule: Schedule, sampler: SamplerName = "ddim") -> float:
    """The guidance scale with which a model of this schedule is drawn by a sampler where nothing else is asked for."""
    return Sampling(sampler=sampler).for_model(schedule).guidance_scale


def one_per_image(
    prompt: str | Sequence[str], negative_prompt: str | Sequence[str], num_images: int
) -> tuple[list[str], list[str]]:
    """Prompts and negative prompts, one of each per image, all images of a prompt in a row.

    Raises:
        UsageError: there is no prompt, or the two do not pair up.
    """
    prompts, negatives = as_list(prompt), as_list(negative_prompt)
    if len(negatives) == 1:
        negatives = negatives * len(prompts)
    if len(negatives) != len(prompts):
        raise UsageError(f"expected one negative prompt or {len(prompts)}, one for each prompt, found {len(negatives)}")
    repeated = range(num_images)
    return [text for text in prompts for _ in repeated], [text for text in negatives for _ in repeated]


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


def batches(count: int, batch_size: int | None) -> list[slice]:
    """Cut `count` images into parts of at most `batch_size`; None is the default."""
    size = SAMPLING["batch_size"].default if batch_size is None else batch_size
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def batches_of_equal_loras(prompts: Sequence[str], syntax: str, batch_size: int) -> list[slice]:
    """Batches whose prompts name the same LoRAs with the same strengths."""
    found: list[slice] = []
    for _, some in groupby(prompts, key=lambda text: read_prompt(text, syntax).loras):
        start = found[-1].stop if found else 0
        found += [slice(start + part.start, start + part.stop) for part in batches(len(list(some)), batch_size)]
    return found
