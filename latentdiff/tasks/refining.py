"""SDXL's second model for the end of the schedule (Podell et al. 2023, section 2.5): the base hands its latents over."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Unpack, cast

import torch
from PIL import Image

from latentdiff.diffusion.latents import NoiseStream
from latentdiff.errors import CheckpointError, UsageError
from latentdiff.image import to_pil
from latentdiff.networks.vae import latent_shape
from latentdiff.pipeline import Pipeline, Start
from latentdiff.recipe import Recipe
from latentdiff.request.calls import public
from latentdiff.request.domains import Real
from latentdiff.request.options import SamplingOptions, SizedOptions
from latentdiff.request.plan import Plan, Sampling
from latentdiff.tasks.editing import with_recipes
from latentdiff.tasks.sources import sampling_of

TASK = "refine"
SWITCH = 0.8
_LATER = 2**32  # between the seeds of the two walks, whose noises must not be the same


@dataclass(frozen=True)
class RefineSettings:
    """What a recipe keeps besides the options."""

    switch: float


@public(SizedOptions, switch=Real(0, 1))
@torch.no_grad()
def refine(
    pipe: Pipeline,
    refiner: Pipeline,
    prompt: str | Sequence[str],
    *,
    switch: float = SWITCH,
    **options: Unpack[SizedOptions],
) -> list[Image.Image]:
    """Make images of what the prompt says, the last steps by another model.

    LoRAs and learned words are those of `pipe` and act there alone; so do controls and image prompts.

    Args:
        pipe: walks the first steps.
        refiner: walks the others and decodes; a model of the same latents.
        switch: 0 to 1, the share of the noise schedule after which it takes over; diffusers' `denoising_end`.
        options: see `SizedOptions`.

    Raises:
        UsageError: an option outside its domain, the models do not fit, or one of them has no step.
    """
    own, other = (each.residence.module("vae").config for each in (pipe, refiner))
    if (own.latent_channels, own.scaling_factor) != (other.latent_channels, other.scaling_factor):
        raise UsageError(
            f"the refiner has other latents: expected {own.latent_channels} channels times {own.scaling_factor:g}, found "
            f"{other.latent_channels} times {other.scaling_factor:g}"
        )
    refiner.check_text_to_image()
    pipe.check_text_to_image()
    size = options.pop("height", None), options.pop("width", None)
    sampling = Sampling(**cast(SamplingOptions, options))
    plan = sampling.plan(prompt, pipe.schedule)
    first, second = parted(plan, refiner, switch)
    shape = latent_shape(size, pipe.default_size, own, None, len(plan.prompts))
    latents = pipe.sample(first, shape, lambda part, noise: Start(plan.start_scale * noise()))

    def start(part: slice, noise: NoiseStream) -> Start:
        return Start(latents[part].to(refiner.device))

    images = to_pil(refiner.decode(refiner.sample(second, shape, start), tile=plan.options.vae_tile))
    source = {"refiner": {"file": refiner.name, "sha256": refiner.model_hash}}
    return with_recipes(pipe, images, plan, TASK, asdict(RefineSettings(switch)), source)


def parted(plan: Plan, refiner: Pipeline, switch: float) -> tuple[Plan, Plan]:
    """The steps at `switch` and noisier levels, and the others, which the refiner takes.

    Raises:
        UsageError: there are none of one of them.
    """
    limit = round(refiner.schedule.num_train_timesteps * (1.0 - switch))
    steps = sum(level.t >= limit for level in plan.levels[:-1])
    if not 0 < steps < plan.steps:
        raise UsageError(
            f"expected a switch that leaves steps to both models, found {switch:g}, which gives the first {steps} of "
            f"{plan.steps}; take more steps or another switch"
        )
    theirs = replace(plan.options, controls=None, image_prompts=None).plan(plan.prompts, refiner.schedule)
    rest = plan.levels[steps:]
    sampler = plan.options.for_model(refiner.schedule).method().over(refiner.schedule, len(rest) - 1)
    second = replace(
        theirs,
        prompts=plan.prompts,
        negatives=plan.negatives,
        seeds=[(seed + _LATER) % 2**64 for seed in plan.seeds],
        batches=plan.batches,
        levels=rest,
        sampler=sampler,
    )
    return replace(plan, levels=plan.levels[: steps + 1]), second


def again(pipe: Pipeline, recipe: Recipe, sources: Mapping[str, Path]) -> Image.Image:
    """The image of a recipe once more.

    Raises:
        CheckpointError: the refiner is another one.
    """
    refiner = Pipeline.load(sources["refiner"], device=str(pipe.device), precision=pipe.precision.name)
    expected = recipe.sources["refiner"].get("sha256", "")
    if refiner.model_hash != expected:
        raise CheckpointError(f"{sources['refiner']} is not the refiner that the image was made with: its hash differs")
    settings = recipe.settings_as(RefineSettings)
    size = {"width": recipe.width, "height": recipe.height}
    return refine(pipe, refiner, recipe.prompt, switch=settings.switch, **size, **sampling_of(recipe, sources))[0]
