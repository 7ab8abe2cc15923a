"""Four times larger by the x4 upscaler of SD 2 (Rombach et al. 2022, section 4.4).

It sees a small image, noised a little, beside latents of the same size, whose VAE makes 4 x 4 pixels of each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Unpack

import torch
from PIL import Image

from latentdiff.checkpoints.index import LOW_RES_SCHEDULE
from latentdiff.diffusion.config import ScheduleConfig
from latentdiff.diffusion.latents import NoiseStream
from latentdiff.diffusion.schedule import Schedule
from latentdiff.errors import UsageError
from latentdiff.image import to_pil, to_tensor
from latentdiff.model.memory.sharing import one_use
from latentdiff.networks.inputs import NEEDS, UPSCALING
from latentdiff.networks.sizes import Told
from latentdiff.pipeline import Pipeline
from latentdiff.recipe import Recipe
from latentdiff.request.calls import public
from latentdiff.request.options import SamplingOptions
from latentdiff.request.plan import Sampling, Start
from latentdiff.request.sources import ImageInput, open_source
from latentdiff.request.task_options import NOISE_LEVEL
from latentdiff.tasks.editing import with_recipes
from latentdiff.tasks.sources import file_of, sampling_of
from latentdiff.tasks.transparency import finished

TASK = "enlarge"
USUAL_NOISE = 20


@dataclass(frozen=True, kw_only=True)
class EnlargeSettings:
    """What a recipe holds of an enlarging besides the sampling."""

    noise_level: int


@public(SamplingOptions, noise_level=NOISE_LEVEL)
@one_use()
@torch.no_grad()
def enlarge(
    pipe: Pipeline,
    image: ImageInput,
    prompt: str | Sequence[str] = "",
    *,
    noise_level: int = USUAL_NOISE,
    **options: Unpack[SamplingOptions],
) -> list[Image.Image]:
    """Make an image four times as wide and high by a diffusion model that was trained for it.

    Args:
        pipe: the x4 upscaler of SD 2, or one like it.
        image: any image of Pillow, or a file, as `image_to_image` takes it.
        prompt: what it shows; it may be empty.
        noise_level: 0 to 350, a timestep: how much noise the model sees the image under. More lets it invent more.
        options: see `SamplingOptions`; `window` for images much larger than those of the training, 128 pixels a side.

    Returns:
        Images with their recipe in `image.info`: RGB, or RGBA with the image's own transparency.

    Raises:
        UsageError: the model is of another kind, or an argument outside its domain.
        DataError: the file is missing or no image.
        NotFiniteError: the model gives NaN or infinity.
        Cancelled: the callback returned False.
    """
    if pipe.inputs != UPSCALING:
        other = NEEDS.get(
            pipe.inputs, "makes images of prompts: with another upscaler, it goes over an image by --diffusion"
        )
        raise UsageError(f"expected a model that enlarges images, found one for {pipe.inputs}: it {other}")
    source = open_source(image)
    colours = source.colours()
    plan = Sampling(**options).plan(prompt, pipe.schedule)
    seen = to_tensor([colours.on("white")]).to(pipe.device)  # (1, 3, h, w)
    height, width = seen.shape[-2:]
    # Components that were made in memory need not say it.
    noised = pipe.augmentation or Schedule(ScheduleConfig.from_diffusers(LOW_RES_SCHEDULE))
    level = noised.level(noise_level)
    label = torch.tensor([[float(noise_level)]], dtype=torch.float32)

    def start(part: slice, noise: NoiseStream) -> Start:
        shown = level.alpha * seen + level.sigma * noise.first(
            (3, height, width)
        )  # the order of draws is that of diffusers
        return Start(plan.start_scale * noise(), extra_channels=shown, told=Told(label, label))

    latents = pipe.sample(plan, (pipe.vae.config.latent_channels, height, width), start)
    images = [finished(one, colours) for one in to_pil(pipe.decode(latents, tile=plan.options.vae_tile))]
    settings = EnlargeSettings(noise_level=noise_level)
    return with_recipes(pipe, images, plan, TASK, asdict(settings), {"image": source.entry})


def again(pipe: Pipeline, recipe: Recipe, sources: Mapping[str, Path]) -> Image.Image:
    """The image of a recipe once more."""
    settings = recipe.settings_as(EnlargeSettings)
    image = file_of(sources, "image")
    return enlarge(pipe, image, recipe.prompt, **asdict(settings), **sampling_of(recipe, sources))[0]
