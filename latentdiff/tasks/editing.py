"""Image to image: noise an image part of the way and denoise it under a prompt (SDEdit, Meng et al. 2022).

Models that see the image besides do it their own way: those for instructions begin from pure noise (InstructPix2Pix, Brooks
et al. 2023).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Unpack

from PIL import Image
from torch import Tensor

from latentdiff.diffusion.latents import NoiseStream
from latentdiff.errors import UsageError
from latentdiff.image import to_pil, to_tensor
from latentdiff.model.memory.sharing import one_use
from latentdiff.networks.inputs import DEPTH, INSTRUCTIONS
from latentdiff.networks.tiny_vae import TinyVAE
from latentdiff.networks.vae import LatentDistribution
from latentdiff.pipeline import Pipeline
from latentdiff.recipe import Recipe
from latentdiff.request.calls import public
from latentdiff.request.options import SamplingOptions
from latentdiff.request.plan import Plan, Sampling, Start
from latentdiff.request.second_pass import first_way_down, last_steps
from latentdiff.request.sources import ImageInput, extended, open_source
from latentdiff.request.task_options import EDIT
from latentdiff.tasks.depths import Depths
from latentdiff.tasks.inversion.artefact import Inversion, given_inversion
from latentdiff.tasks.inversion.run import invert
from latentdiff.tasks.sources import file_of, resized, sampling_of, warn_if_large
from latentdiff.tasks.transparency import finished

TASK = "edit"
STRENGTH = 0.6
IMAGE_GUIDANCE = 1.5  # of models for instructions, as their authors have it


# (model, the image extended to whole cells, its latents) -> what the U-Net sees of it beside its latents, (1, E, h, w)
Seen = Callable[[Pipeline, Image.Image, LatentDistribution], Tensor]


@dataclass(frozen=True, kw_only=True)
class EditSettings:
    """What a recipe holds of an edit besides the sampling; sizes in pixels, as asked for.

    image_guidance_scale: of a model for instructions.
    inversion: the arguments of `invert` by which its start was found, if it began from an inversion in memory.
    """

    strength: float
    image_guidance_scale: float | None = None
    width: int | None = None
    height: int | None = None
    inversion: dict[str, Any] | None = None


@public(SamplingOptions, **EDIT)
@one_use()
def image_to_image(
    pipe: Pipeline,
    image: ImageInput | Inversion,
    prompt: str | Sequence[str],
    *,
    strength: float | None = None,
    image_guidance_scale: float | None = None,
    depth: ImageInput | None = None,
    width: int | None = None,
    height: int | None = None,
    **options: Unpack[SamplingOptions],
) -> list[Image.Image]:
    """Change an image towards a prompt, or as it says where the model follows instructions ("make it winter").

    The image is noised to the level where the last `int(steps * strength)` steps begin, and those are taken, as in
    diffusers' img2img; so the cost is `strength` times that of generating. With strength 0 it is given back as it is.

    An inversion begins on its own trajectory instead of from drawn noise: under the prompt that it was made with,
    without guidance, the image comes back; under another, more of the image stays than noise would leave.

    Args:
        image: any image of Pillow, or a file; it is turned upright by its EXIF entry, brought to sRGB, and seen on white.
            Or its inversion, a file or an `Inversion`, made with the same model; the steps, by default all of its own,
            have to pass through its noise levels. Seeds then make a difference only to samplers that draw noise.
        strength: 0 to 1, how far to go from the image. None is 0.6, and 1 for models for instructions, which see the image
            all the while: 1 begins from pure noise there.
        image_guidance_scale: of models for instructions: how strongly to keep to the image, beside `guidance_scale`, how
            strongly to follow the text (Brooks et al. 2023, eq. 3). None is 1.5; 1 is no guidance.
        depth: of depth models (SD 2): a map of the image, brighter where it is nearer, or the folder of a depth model of
            transformers. None is the one in the model's own folder.
        width: bring the image to this width in pixels first; alone it keeps the proportions, None is its own size.
            Sides that are no multiples of the VAE's factor (8) are extended by their last pixels and cut again at the
            end.
        height: likewise.
        options: see `SamplingOptions`: negative_prompt, steps, guidance_scale, sampler, seed, num_images, ...

    Returns:
        Images of that size with their recipe in `image.info`: RGB, or RGBA with the image's own transparency.

    Raises:
        UsageError: an argument outside its domain or not for this model, or steps that do not fit the inversion.
        DataError: the file is missing or no image.
        CheckpointError: the inversion was made with another model.
        NotFiniteError: the model gives NaN or infinity.
        Cancelled: the callback returned False.
    """
    given = given_inversion(image)
    if isinstance(given, tuple):
        pipe.check_text_to_image()
        return _from_inversion(
            pipe, *given, prompt, STRENGTH if strength is None else strength, (width, height), options
        )
    pipe.check_text_to_image(INSTRUCTIONS, DEPTH)
    if depth is not None and pipe.inputs != DEPTH:
        raise UsageError("expected no depth with this model, found one; a ControlNet for depths takes it (--control)")
    source, is_told = open_source(given), pipe.inputs == INSTRUCTIONS
    if strength is None:
        strength = 1.0 if is_told else STRENGTH
    image_scale = _image_guidance(image_guidance_scale, is_told=is_told)
    plan = begin_at(Sampling(**options).plan(prompt, pipe.schedule), strength)
    plan = replace(plan, guidance=replace(plan.guidance, image_scale=1.0 if image_scale is None else image_scale))
    colours = source.colours()
    shown = resized(colours.on("white"), width, height)
    depths = Depths.of(pipe, depth, shown.size) if pipe.inputs == DEPTH and plan.steps else None
    seen = depths.seen if depths else as_encoded if is_told else None
    images = [shown.copy() for _ in plan.prompts]
    if plan.steps:
        images = walked(pipe, shown, plan, seen, from_noise=is_told and strength == 1.0)
    images = [finished(image, colours) for image in images]
    settings = EditSettings(strength=strength, image_guidance_scale=image_scale, width=width, height=height)
    sources = {"image": source.entry, **(depths.sources if depths else {})}
    return with_recipes(pipe, images, plan, TASK, asdict(settings), sources)


def again(pipe: Pipeline, recipe: Recipe, sources: Mapping[str, Path]) -> Image.Image:
    """The image of a recipe once more."""
    settings = asdict(recipe.settings_as(EditSettings))
    inverting = settings.pop("inversion")
    source: ImageInput | Inversion = sources["inversion"] if "inversion" in sources else file_of(sources, "image")
    if inverting is not None:
        source = invert(pipe, source, measure=False, progress=False, **inverting)
    depth = sources.get("depth") or sources.get("depth_model")
    return image_to_image(pipe, source, recipe.prompt, depth=depth, **settings, **sampling_of(recipe, sources))[0]


def begin_at(plan: Plan, strength: float) -> Plan:
    """The plan cut to its last `int(steps * strength)` steps, as diffusers counts them.

    Of a walk that goes up in noise again, the steps of its first way down count, and what lies above its new start is
    not walked.

    Raises:
        UsageError: a strength outside 0 to 1, or one so small that no step is left.
    """
    if not 0.0 <= strength <= 1.0:
        raise UsageError(f"expected a strength of 0 to 1, found {strength}")
    steps = len(first_way_down(plan.levels)) - 1
    taken = min(int(steps * strength), steps)
    if strength and not taken:
        raise UsageError(
            f"expected a strength of at least 1 / steps, found {strength} with {steps} steps, less than one step; "
            "raise one of the two"
        )
    return replace(plan, levels=last_steps(plan.levels, taken))


def as_encoded(pipe: Pipeline, image: Image.Image, encoded: LatentDistribution) -> Tensor:
    """What models for instructions see: the likeliest latents (1, C, h, w), without the factor that others have.

    Raises:
        UsageError: a tiny VAE, which knows no others.
    """
    if isinstance(pipe.vae, TinyVAE):
        raise UsageError("this model sees images as its own VAE encodes them, found a tiny one; leave it out (--vae)")
    return pipe.vae.unscaled(encoded.mode())


def _image_guidance(scale: float | None, *, is_told: bool) -> float | None:
    if is_told:
        return IMAGE_GUIDANCE if scale is None else scale
    if scale is not None:
        raise UsageError(
            f"expected no image_guidance_scale with this model, found {scale:g}: only models that follow instructions about "
            "an image have it"
        )
    return None


def with_recipes(
    pipe: Pipeline,
    images: list[Image.Image],
    plan: Plan,
    task: str,
    settings: dict[str, Any],
    sources: dict[str, dict[str, str]],
) -> list[Image.Image]:
    """The images of a plan, each with its recipe in `image.info`, and nothing else there but its colour profile."""
    for image, fields in zip(images, plan.recipe_fields(), strict=True):
        size = {"width": image.width, "height": image.height}
        recipe = pipe.recipe(**fields, **size, task=task, task_settings=settings, sources=sources)
        image.info = {
            **{name: image.info[name] for name in ("icc_profile",) if name in image.info},
            **recipe.to_chunks(),
        }
    return images


def following(options: SamplingOptions, inversion: Inversion) -> SamplingOptions:
    """The options, with the steps and the spacing of an inversion where they are left open."""
    if options.get("fast"):
        return options
    found = options.copy()
    if found.get("steps") is None:
        found["steps"] = inversion.steps
    if found.get("spacing") is None:
        found["spacing"] = inversion.settings["spacing"]
    return found


def _from_inversion(
    pipe: Pipeline,
    found: Inversion,
    sources: dict[str, dict[str, str]],
    prompt: str | Sequence[str],
    strength: float,
    size: tuple[int | None, int | None],
    options: SamplingOptions,
) -> list[Image.Image]:
    if size != (None, None):
        raise UsageError("expected no size with an inversion, which has its own; invert the image with that size")
    found.check_model(pipe.model_hash)
    plan = begin_at(Sampling(**following(options, found)).plan(prompt, pipe.schedule), strength)
    begin = found.at(plan.levels[0]).to(pipe.device)  # (1, C, h, w)

    def start(part: slice, noise: NoiseStream) -> Start:
        return Start(begin.repeat(part.stop - part.start, 1, 1, 1))

    channels, height, width = begin.shape[1:]
    shape = (channels, height, width)
    latents = pipe.sample(plan, shape, start) if plan.steps else begin.repeat(len(plan.prompts), 1, 1, 1)
    images = [image.crop((0, 0, *found.size)) for image in to_pil(pipe.decode(latents, tile=plan.options.vae_tile))]
    again = {"prompt": found.prompt, **found.settings} if "image" in sources else None
    return with_recipes(pipe, images, plan, TASK, asdict(EditSettings(strength=strength, inversion=again)), sources)


def walked(
    pipe: Pipeline, image: Image.Image, plan: Plan, seen: Seen | None = None, *, from_noise: bool = False
) -> list[Image.Image]:
    """An image, RGB, noised to the first level of a plan and walked down again, once for each of its seeds.

    Args:
        seen: what the U-Net sees of the image all the while.
        from_noise: begin from pure noise instead.
    """
    if plan.options.window is None:
        warn_if_large(pipe, image, "give a smaller width and height")
    whole = extended(image, pipe.vae.config.downscale)
    encoded = pipe.encode_images(to_tensor([whole]), tile=plan.options.vae_tile)
    first = plan.levels[0]
    beside = seen and seen(pipe, whole, encoded)

    def start(part: slice, noise: NoiseStream) -> Start:
        extra = None if beside is None else beside.expand(part.stop - part.start, -1, -1, -1)
        if from_noise:
            return Start(plan.start_scale * noise(), extra_channels=extra)
        latents = encoded.sample(noise())  # (N, C, h, w); the order of draws is that of diffusers
        return Start(first.alpha * latents + first.sigma * noise(), extra_channels=extra)

    channels, height, width = encoded.mean.shape[1:]
    latents = pipe.sample(plan, (channels, height, width), start)
    return [one.crop((0, 0, *image.size)) for one in to_pil(pipe.decode(latents, tile=plan.options.vae_tile))]
