"""Restoring damaged images: the model as a prior, a known operator as what happened (see `operators` and
`restoration`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Unpack

import torch
from PIL import Image
from torch import Tensor

from latentdiff.diffusion.denoise import Step
from latentdiff.diffusion.latents import NoiseStream
from latentdiff.diffusion.schedule import Level
from latentdiff.errors import DataError, UsageError
from latentdiff.image import to_pil, to_tensor
from latentdiff.model.memory.sharing import one_use
from latentdiff.networks.device import finite_or_float32
from latentdiff.pipeline import Pipeline
from latentdiff.recipe import Recipe
from latentdiff.request.calls import public
from latentdiff.request.options import RestorationName, SeededOptions, options_of
from latentdiff.request.plan import Plan, Sampling, Start
from latentdiff.request.sources import ImageInput, open_source
from latentdiff.request.task_options import RESTORE
from latentdiff.tasks.editing import with_recipes
from latentdiff.tasks.restoration.methods import (
    Autoencoder,
    InverseProblem,
    RestorationMethod,
    get_method,
    within_noise,
)
from latentdiff.tasks.restoration.operators import Inside, Operator, describe, from_description
from latentdiff.tasks.restoration.operators.operator import Shape
from latentdiff.tasks.sources import warn_if_large

TASK = "restore"
STEPS = {"diffpir": 50, "dps": 250, "psld": 250, "resample": 100, "graikos": 200}
# Where the methods' own defaults are for pixels. Pixels in [-1, 1] stray from their mean by about 1/2, which bounds the
# error of a prediction; latents have about twice that spread and fewer entries, so that gradients have to lead further.
SETTINGS: dict[str, dict[str, float]] = {
    "diffpir": {"prior_std": 0.5, "begin": 4.0},
    "dps": {"scale": 15.0},
    "psld": {"scale": 4.0},
    "graikos": {"constraint": 300.0},
}
GUIDANCE_WITH_PROMPT = 3.0
# Rounding to 8 bits is noise of this standard deviation, in [-1, 1].
EIGHT_BITS = 2.0 / 255.0 / 12.0**0.5
SMALL = 256 * 256  # pixels; two such images at once are encoded faster than one after the other
WHITE = 0.25  # the standard deviation, in [-1, 1], that is white in an image of the uncertainty


@dataclass(frozen=True)
class Restoration:
    """What `restore` found: samples from the images that the measurement allows.

    images: the samples, with their recipes in `image.info`.
    mean: of the samples; nearest to the truth in squares, and smoother than any of them. With its recipe.
    uncertainty: (H, W), how far the samples stray at each pixel: their standard deviation in [-1, 1], over samples and
        colours; None of a single sample.
    residuals: of each sample, the root mean square of y - A x over what was measured, to be compared with `noise_std`.
    """

    images: list[Image.Image]
    mean: Image.Image
    uncertainty: Tensor | None
    residuals: list[float]
    noise_std: float

    def uncertainty_image(self) -> Image.Image:
        """The uncertainty as a grey image: black is certain, white a standard deviation of 0.25 or more.

        Raises:
            UsageError: there is only one sample.
        """
        if self.uncertainty is None:
            raise UsageError("the uncertainty needs 2 or more samples, found 1")
        return Image.fromarray((self.uncertainty / WHITE).clamp(0, 1).mul(255).round().byte().numpy())


@dataclass(frozen=True, kw_only=True)
class RestoreSettings:
    """What a recipe holds of a restoration besides the sampling.

    operator: see `operators.describe`.
    settings: of the method, where they are not its defaults.
    keep_measurement: whether the end was brought within the noise of the measurement.
    samples: the image is the mean of that many, with this seed and the next ones; 0 is one sample itself.
    """

    operator: dict[str, Any]
    method: RestorationName
    settings: dict[str, float | bool] = field(default_factory=dict)
    keep_measurement: bool = True
    samples: int = 0


@public(SeededOptions, **RESTORE)
@one_use()
def restore(
    pipe: Pipeline,
    image: ImageInput | Tensor,
    operator: Operator,
    *,
    method: RestorationName = "diffpir",
    prompt: str = "",
    samples: int = 1,
    noise_std: float | None = None,
    steps: int | None = None,
    guidance_scale: float | None = None,
    settings: Mapping[str, float | bool] | None = None,
    keep_measurement: bool = True,
    **options: Unpack[SeededOptions],
) -> Restoration:
    """Find images that the operator would have made into `image`, and that the model finds likely.

    Images whose sides the VAE cannot make (no multiples of 8) are restored as part of a larger one. An image of
    which everything is known comes back as it is, as far as noise allows; where nothing is known, the result is what
    the prompt generates.

    Args:
        image: the damaged image; or a measurement (1, c, h, w) in the operator's own range. A small one for
            super-resolution, for inpainting one of full size whose missing pixels may hold anything, for colourising a
            grey one.
        operator: what happened to it; a member of `latentdiff.tasks.restoration.operators`, or a class or function of
            your own.
        method: "diffpir", "dps", "psld", "resample" or "graikos"; their classes in
            `latentdiff.tasks.restoration.methods` say what they cost.
        prompt: what the image shows, if known.
        samples: how many images, each with a seed of its own.
        noise_std: of the noise in `image`, in [-1, 1], in place of the operator's; 0 is none but that of 8 bits.
        steps: of the denoise loop; None is what suits the method.
        guidance_scale: None is 3 with a prompt and 1 without.
        settings: of the method, in place of its defaults.
        keep_measurement: at the end, go to the nearest image that explains the measurement to within its noise. So
            what the VAE cannot draw comes back where it was measured.
        options: see `SeededOptions`: negative_prompt, seed, guidance_rescale, guidance_interval, batch_size, callback,
            progress; sampler and levels are the method's.

    Raises:
        UsageError: an argument outside its domain, or an operator that does not fit the image.
        DataError: the file is missing or no image.
        NotFiniteError: the model gives NaN or infinity.
        Cancelled: the callback returned False.
    """
    pipe.check_text_to_image()
    way = get_method(method, **{**SETTINGS.get(method, {}), **(settings or {})})
    if noise_std is not None:
        operator = operator.with_noise(noise_std)
    measured, sources = _measurement(image, operator)
    fitted = _fitted(operator, measured, pipe)
    steps = STEPS[method] if steps is None else steps
    if guidance_scale is None:
        guidance_scale = GUIDANCE_WITH_PROMPT if prompt else 1.0
    sampling = Sampling(steps=steps, guidance_scale=guidance_scale, num_images=samples, **options)
    plan = sampling.plan(prompt, pipe.schedule)
    levels = way.levels(pipe.schedule, steps)
    problem = InverseProblem(fitted, measured.to(pipe.device), autoencoder_of(pipe))
    plan = replace(plan, levels=levels, sampler=replace(plan.sampler, step=_batch_step(way, problem, levels)))
    decoded, residuals = _walk(pipe, plan, way, problem, keep_measurement)

    about = RestoreSettings(
        operator=describe(operator), method=method, settings=dict(settings or {}), keep_measurement=keep_measurement
    )
    images = with_recipes(pipe, to_pil(decoded), plan, TASK, asdict(about), sources)
    first = replace(plan, prompts=plan.prompts[:1], negatives=plan.negatives[:1], seeds=plan.seeds[:1])
    of_mean = asdict(replace(about, samples=samples))
    (mean,) = with_recipes(pipe, to_pil(decoded.mean(dim=0, keepdim=True)), first, TASK, of_mean, sources)
    spread = decoded.var(dim=0).mean(dim=0).sqrt() if samples > 1 else None  # (H, W)
    return Restoration(images, mean, spread, residuals, operator.noise_std)


def again(pipe: Pipeline, recipe: Recipe, sources: Mapping[str, Path]) -> Image.Image:
    """The image of a recipe once more.

    Raises:
        DataError: it was made with an operator or a measurement that no file holds.
    """
    own = recipe.settings_as(RestoreSettings)
    operator = from_description(own.operator)
    if "image" not in sources:
        raise DataError("the image was restored from a measurement in memory, which a recipe does not hold")
    kept = options_of(SeededOptions).keys() | {"steps", "guidance_scale"}
    options = {name: value for name, value in recipe.sampling().items() if name in kept}
    found = restore(
        pipe,
        sources["image"],
        operator,
        method=own.method,
        prompt=recipe.prompt,
        samples=max(own.samples, 1),
        settings=own.settings,
        keep_measurement=own.keep_measurement,
        **options,
    )
    return found.mean if own.samples else found.images[0]


def autoencoder_of(pipe: Pipeline) -> Autoencoder:
    """The pipeline's VAE as functions that gradients pass; one image at a time, or two small ones; float32
    outside."""

    def encode(images: Tensor) -> Tensor:
        def one(part: Tensor) -> Tensor:
            return finite_or_float32(
                "the VAE's encoder", pipe.vae, lambda dtype: pipe.vae.encode(part.to(dtype)).mode()
            )

        at_once = 2 if images.shape[-2] * images.shape[-1] <= SMALL else 1
        return torch.cat([one(part).float() for part in images.split(at_once)])

    def decode(latents: Tensor) -> Tensor:
        def one(latent: Tensor) -> Tensor:
            return finite_or_float32("the VAE's decoder", pipe.vae, lambda dtype: pipe.vae.decode(latent.to(dtype)))

        return torch.cat([one(latent).float() for latent in latents.split(1)])

    return Autoencoder(encode, decode)


def _measurement(image: ImageInput | Tensor, operator: Operator) -> tuple[Tensor, dict[str, dict[str, str]]]:
    """The measurement (1, c, h, w), and what recipes say about where it came from."""
    if not isinstance(image, Tensor):
        source = open_source(image)
        return operator.read(to_tensor([source.opaque()])), {"image": source.entry}
    if image.ndim != 4 or len(image) != 1 or not image.is_floating_point() or not torch.isfinite(image).all():
        raise UsageError(
            f"expected one finite measurement of shape (1, c, h, w), found {tuple(image.shape)}, {image.dtype}"
        )
    return image.detach().float(), {}


def _shape(measurement: Tensor) -> Shape:
    channels, height, width = measurement.shape[1:]
    return channels, height, width


def _fitted(operator: Operator, measured: Tensor, pipe: Pipeline) -> Operator:
    """The operator on an image that the VAE can make.

    Raises:
        UsageError: the operator does not fit the measurement, or the image is too small.
    """
    shape = operator.image_shape(_shape(measured))
    expected = operator.measurement_shape(shape)
    if _shape(measured) != expected:
        raise UsageError(f"expected a measurement of shape {expected} for this operator, found {_shape(measured)}")
    factor = pipe.vae.config.downscale
    height, width = shape[1:]
    if min(height, width) < factor:
        raise UsageError(f"expected an image of at least {factor}x{factor} pixels to restore, found {width}x{height}")
    warn_if_large(pipe, Image.new("1", (width, height)), "restore a smaller part of it")
    whole = (-(-height // factor) * factor, -(-width // factor) * factor)
    return operator if whole == (height, width) else Inside(operator, (height, width), whole)


def _batch_step(way: RestorationMethod, problem: InverseProblem, levels: list[Level]) -> Step:
    """The method's step for batches of any size, which all have the one measurement."""

    def step(denoiser: Any, x: Tensor, *rest: Any) -> tuple[Tensor, Any]:
        return way.step(_for_batch(problem, len(x)), levels)(denoiser, x, *rest)

    return step


def _for_batch(problem: InverseProblem, count: int) -> InverseProblem:
    return replace(problem, measurement=problem.measurement[:1].expand(count, -1, -1, -1))


@torch.no_grad()
def _walk(
    pipe: Pipeline, plan: Plan, way: RestorationMethod, problem: InverseProblem, keep: bool
) -> tuple[Tensor, list[float]]:
    """The images (N, 3, H, W) on the CPU, and how far each misses the measurement before it is clipped to [-1, 1]."""
    operator = problem.operator
    factor = pipe.vae.config.downscale
    height, width = operator.image_shape(_shape(problem.measurement))[1:]
    shape = (pipe.vae.config.latent_channels, height // factor, width // factor)

    def start(part: slice, noise: NoiseStream) -> Start:
        return Start(way.start(_for_batch(problem, part.stop - part.start), noise))

    images = pipe.decode(pipe.sample(plan, shape, start))
    everyone = _for_batch(problem, len(images))
    if keep:
        images = within_noise(operator, everyone.measurement, images, max(operator.noise_std, EIGHT_BITS))
    residuals = everyone.residual(images).tolist()
    return (operator.crop(images) if isinstance(operator, Inside) else images).clamp(-1, 1).cpu(), residuals
