"""Inverting an image with a pipeline, and sampling back from what was found."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from latentdiff.diffusion.denoise import Callback, Step, denoise, progress_bar, report
from latentdiff.diffusion.guidance import UNGUIDED, Guidance, guided_denoiser
from latentdiff.diffusion.parameterization import Denoiser, Prediction, parameterization
from latentdiff.diffusion.samplers import SAMPLERS, ddim
from latentdiff.diffusion.schedule import Level
from latentdiff.errors import UsageError
from latentdiff.image import to_tensor
from latentdiff.model.memory.sharing import one_use
from latentdiff.networks.conditioning import Conditioning
from latentdiff.networks.device import explained_out_of_memory
from latentdiff.networks.steering import checked_model
from latentdiff.pipeline import Pipeline
from latentdiff.request.calls import public
from latentdiff.request.options import InversionName, SpacingName
from latentdiff.request.sources import ImageInput, extended, open_source
from latentdiff.request.task_options import INVERT
from latentdiff.tasks.inversion import edict
from latentdiff.tasks.inversion.artefact import Inversion, psnr
from latentdiff.tasks.inversion.ddim import Quantity, high_step, low_step, quantity_of
from latentdiff.tasks.inversion.null_text import NullTextSettings, optimise
from latentdiff.tasks.sources import resized, warn_if_large

EDICT_GUIDANCE = 3.0  # the paper's
LARGEST_NOISE_STD = 1.3  # above, EDICT's two latents have drifted apart


@public(**INVERT)
@one_use()
@torch.no_grad()
def invert(
    pipe: Pipeline,
    image: ImageInput,
    *,
    prompt: str = "",
    method: InversionName = "fixed-point",
    steps: int = 50,
    iterations: int = 1,
    guidance_scale: float | None = None,
    mixing: float | None = None,
    spacing: SpacingName | None = None,
    width: int | None = None,
    height: int | None = None,
    measure: bool = True,
    callback: Callback | None = None,
    progress: bool = True,
) -> Inversion:
    """Find the noise that sampling would make the image of, and every step of the way there.

    Args:
        image: a PIL image, or the path of a file.
        prompt: what the image shows; "" is allowed. Null-text and EDICT need it to be of use.
        method: what follows up in noise. Cost in evaluations of the U-Net per step:
            "fixed-point"  DDIM with `iterations` corrections of each step (ReNoise); iterations + 1
            "ddim-high"    DDIM as diffusers does it; 1
            "ddim-low"     DDIM, the sampler's step walked upwards; 1
            "edict"        two coupled latents, exact; 4
            "null-text"    fixed-point, then the null embedding of each step that makes guided sampling exact; up to 10
            with
                           their backward passes besides
        steps: of the trajectory, 1 to the number of training timesteps.
        iterations: of "fixed-point" and "null-text".
        guidance_scale: of "edict" (3) and "null-text" (5); the editing that follows has to use the same.
        mixing: p of "edict"; None is `mixing_for` the steps.
        spacing: as for generation; None is what the model says.
        width: bring the image to this width in pixels first, as in `image_to_image`.
        height: likewise.
        measure: sample back and compare with the image; as many evaluations as unguided sampling (EDICT: guided)
            takes.
        callback: as for generation.
        progress: as for generation.

    Raises:
        UsageError: an argument outside its domain.
        DataError: the file is missing or no image.
        NotFiniteError: the inversion diverges; try fewer iterations or more steps.
        Cancelled: the callback returned False.
    """
    pipe.check_text_to_image()
    if guidance_scale is None:
        guidance_scale = {"edict": EDICT_GUIDANCE, "null-text": NullTextSettings().guidance_scale}.get(method, 1.0)
    elif method not in ("edict", "null-text") and guidance_scale != 1.0:
        raise UsageError(f"expected no guidance in the inversion {method}, found {guidance_scale}; guide when editing")
    if mixing is not None and method != "edict":
        raise UsageError(f"mixing belongs to the inversion edict, found mixing {mixing} with {method}")
    source = open_source(image)
    shown = resized(source.opaque(), width, height)
    warn_if_large(pipe, shown, "give a smaller width and height")
    latents = pipe.encode_images(to_tensor([extended(shown, pipe.vae.config.downscale)])).mode()
    inversion = Inversion(
        latents=latents,
        levels=tuple(SAMPLERS["ddim"].levels(pipe.schedule, steps, spacing)),
        embeddings=pipe.encode([prompt]),
        prompt=prompt,
        method=method,
        model=pipe.name,
        model_hash=pipe.model_hash,
        size=shown.size,
        settings={
            "method": method,
            "steps": steps,
            "iterations": iterations,
            "guidance_scale": guidance_scale,
            "mixing": mixing,
            "spacing": spacing,
            "width": width,
            "height": height,
        },
        source=source.entry,
    )
    stages = 1 + (method == "null-text") + measure
    with explained_out_of_memory(), progress_bar(steps * stages, progress) as bar:
        inversion = _walk_up(pipe, inversion, callback, bar)
        if method == "null-text":
            inversion = with_null_text(pipe, inversion, guidance_scale, callback=callback, bar=bar)
        if measure:
            back = reconstruct(pipe, inversion, callback=callback, bar=bar)
            kept, floor = (psnr(_decoded(pipe, x, shown.size), to_tensor([shown])) for x in (back, latents))
            inversion = replace(inversion, reconstruction_db=kept, floor_db=floor)
    return inversion


def _walk_up(pipe: Pipeline, inversion: Inversion, callback: Callback | None, bar: tqdm) -> Inversion:
    """The trajectory of an inversion that holds only the image's latents as yet."""
    x, levels = inversion.latents.to(pipe.device), inversion.levels
    coupled = inversion.method == "edict"
    if coupled:
        x = torch.cat([x, x])
    trajectory, astray = [x], []
    for step in denoise(source_denoiser(pipe, inversion), x, levels[::-1], _upward_step(pipe, inversion, astray)):
        bar.update()
        report(step, callback)
        trajectory.append(step.x)
    found = torch.stack(trajectory[::-1])  # (S + 1, 1 or 2, C, h, w)
    inversion = replace(inversion, latents=found[:, 0], partner=found[0, 1] if coupled else None)
    if astray:
        warnings.warn(
            f"the corrections grew in place of converging at {len(astray)} of {inversion.steps} steps, the first at timestep "
            f"{astray[0].t:g}; the best of each was kept. More steps, or a prompt that says what the image shows, may help",
            stacklevel=2,
        )
    std = inversion.noise_statistics()["std"]
    if coupled and std > LARGEST_NOISE_STD:
        warnings.warn(
            f"EDICT's latents have drifted apart (standard deviation of the noise {std:.2f}, expected about 1); "
            "take a mixing nearer to 1",
            stacklevel=2,
        )
    return inversion


def _upward_step(pipe: Pipeline, inversion: Inversion, astray: list[Level]) -> Step:
    """`astray` receives the levels at which corrections did not converge."""
    quantity = quantity_of(pipe.schedule.config.prediction_type)
    match inversion.method:
        case "edict":
            return edict.inversion_step(inversion.levels, *_coupling(inversion))
        case "ddim-low":
            return low_step
        case _:
            iterations = 0 if inversion.method == "ddim-high" else inversion.settings["iterations"]
            return high_step(quantity, iterations, astray.append)


def _coupling(inversion: Inversion) -> tuple[float, Quantity]:
    """EDICT's mixing and quantity."""
    quantity = edict.quantity_for(inversion.levels)
    asked = inversion.settings["mixing"]
    return (edict.mixing_for(inversion.steps, quantity) if asked is None else asked), quantity


def _decoded(pipe: Pipeline, latents: Tensor, size: tuple[int, int]) -> Tensor:
    """An image (1, 3, H, W) without the border that made its sides fit the VAE."""
    width, height = size
    return pipe.decode(latents)[..., :height, :width].cpu()


def source_denoiser(pipe: Pipeline, inversion: Inversion) -> Denoiser:
    """What follows the source's own prompt as the inversion did."""
    guidance = Guidance(scale=inversion.settings["guidance_scale"]) if inversion.method == "edict" else UNGUIDED
    embeddings, empty = inversion.embeddings.to(pipe.device), pipe.encode([""], negative=True)
    return pipe.denoiser(
        embeddings, empty, guidance, inversion.levels, sizes=pipe.told_of_latents(inversion.latents.shape)
    )


@torch.no_grad()
def reconstruct(
    pipe: Pipeline, inversion: Inversion, *, callback: Callback | None = None, bar: tqdm | None = None
) -> Tensor:
    """Sample back to the source: latents (1, C, h, w).

    Without guidance; EDICT and null-text with the guidance that their inversion is made for.

    Raises:
        CheckpointError: the inversion was made with another model.
    """
    inversion.check_model(pipe.model_hash)
    denoiser = source_denoiser(pipe, inversion)
    if inversion.nulls is not None:
        guidance = Guidance(scale=inversion.settings["guidance_scale"])
        denoiser = null_text_denoiser(pipe, inversion, inversion.embeddings, guidance)
    return walk_down(pipe, inversion, denoiser, 1, callback=callback, bar=bar)


def walk_down(
    pipe: Pipeline,
    inversion: Inversion,
    denoiser: Denoiser,
    count: int,
    *,
    callback: Callback | None = None,
    bar: tqdm | None = None,
) -> Tensor:
    """Sample `count` times from the inversion's noise with `denoiser`, made for that batch: latents (count, C, h,
    w)."""
    x = inversion.latents[:1].to(pipe.device).repeat(count, 1, 1, 1)
    step: Step = ddim.step
    if inversion.partner is not None:
        x = torch.cat([x, inversion.partner.to(x).expand_as(x)])
        step = edict.sampling_step(inversion.levels, *_coupling(inversion))
    for done in denoise(denoiser, x, inversion.levels, step):
        if bar is not None:
            bar.update()
        report(done, callback)
        x = done.x
    return x[:count]


def with_null_text(
    pipe: Pipeline,
    inversion: Inversion,
    guidance_scale: float,
    *,
    callback: Callback | None = None,
    bar: tqdm | None = None,
) -> Inversion:
    """The inversion with the null embeddings that make its reconstruction exact under this guidance; see
    `null_text`."""
    inversion.check_model(pipe.model_hash)
    settings = NullTextSettings(guidance_scale=guidance_scale)
    model = checked_model(pipe.unet, pipe.unet, inversion.levels)
    read = parameterization(pipe.schedule.config.prediction_type)

    sizes = pipe.told_of_latents(inversion.latents.shape)

    def following(embeddings: Tensor) -> Denoiser:
        return guided_denoiser(model, read, Conditioning.of(pipe.unet, embeddings, sizes=sizes and sizes.positive))

    pivots = [latents.to(pipe.device) for latents in inversion.latents.split(1)]
    embeddings, null = inversion.embeddings.to(pipe.device), pipe.encode([""], negative=True)
    nulls = []
    with _frozen(pipe.unet):
        for step in optimise(following(embeddings), following, read, null, inversion.levels, pivots, settings):
            if bar is not None:
                bar.update()
            report(step.done, callback)
            nulls.append(step.null)
    return replace(inversion, nulls=torch.cat(nulls), settings=inversion.settings | {"guidance_scale": guidance_scale})


def null_text_denoiser(pipe: Pipeline, inversion: Inversion, positive: Tensor, guidance: Guidance) -> Denoiser:
    """Follow `positive` (N, L, C), guided away at each step from the null embedding that was found for it."""
    assert inversion.nulls is not None, "null_text_denoiser is for inversions with null embeddings"
    nulls = dict(zip(inversion.levels, inversion.nulls.split(1), strict=False))
    sizes = pipe.told_of_latents(inversion.latents.shape)

    def of_level(level: Level) -> Denoiser:
        negative = nulls[level].to(positive).expand_as(positive)
        return pipe.denoiser(positive, negative, guidance, inversion.levels, sizes=sizes)

    return per_level(of_level)


def per_level(of_level: Callable[[Level], Denoiser]) -> Denoiser:
    """A denoiser that is another one at every level."""

    def denoise(x: Tensor, level: Level) -> Prediction:
        return of_level(level)(x, level)

    return denoise


@contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    """Keep autograd from storing what only the gradients of weights need."""
    needed = [parameter for parameter in module.parameters() if parameter.requires_grad]
    try:
        for parameter in needed:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in needed:
            parameter.requires_grad_(True)
