"""Text to image: the way from a prompt to a picture on one page.

    prompt -> tokens -> embeddings ┐
    seed   -> start noise ---------┴-> denoise loop (schedule, sampler, guidance, U-Net) -> VAE -> image

Rombach et al. 2022, "High-Resolution Image Synthesis with Latent Diffusion Models".
"""

from __future__ import annotations

import math
import os
import secrets
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from numbers import Integral
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from latentdiff import __version__
from latentdiff.config import ScheduleConfig
from latentdiff.denoise import DenoiseStep, denoise
from latentdiff.device import (
    FORMATS,
    Precision,
    describe_device,
    finite_or_float32,
    is_out_of_memory,
    pick_device,
    pick_precision,
    precision_of,
)
from latentdiff.embedded import embedded_model
from latentdiff.errors import CheckpointError, LatentDiffError, UsageError
from latentdiff.guidance import Guidance, guided_denoiser
from latentdiff.image import to_pil
from latentdiff.latents import NoiseStream
from latentdiff.layers.transformer import ProjectedContext
from latentdiff.parameterization import Denoiser, parameterization
from latentdiff.prompt import as_list, tokenize
from latentdiff.recipe import Recipe
from latentdiff.samplers import get_sampler
from latentdiff.schedule import Level, Schedule
from latentdiff.unet import UNet
from latentdiff.vae import VAE

if TYPE_CHECKING:
    from latentdiff.checkpoints import Components

# (step from 0, timestep, predicted x0 (N, C, h, w)) -> False to cancel, anything else to go on.
Callback = Callable[[int, float, Tensor], Any]

DEFAULT_BATCH_SIZE = 4


class Cancelled(LatentDiffError):
    """The callback returned False; no picture was made."""


class Pipeline:
    """A text-to-image model: tokenizer, text encoder, U-Net, VAE and noise schedule, each usable alone.

    Args:
        tokenizer: a CLIP tokenizer of transformers.
        text_encoder: token ids (N, L) -> embeddings (N, L, C).
        name, model_hash, ema: what recipes say about the model.

    Raises:
        CheckpointError: the parts do not fit one another.
    """

    def __init__(
        self,
        tokenizer: Any,
        text_encoder: torch.nn.Module,
        unet: UNet,
        vae: VAE,
        schedule_config: ScheduleConfig,
        *,
        name: str = "",
        model_hash: str = "",
        ema: bool = False,
    ) -> None:
        self.tokenizer = tokenizer
        self.text_encoder = text_encoder.eval()
        self.unet = unet.eval()
        self.vae = vae.eval()
        self.schedule = Schedule(schedule_config)
        self.name, self.model_hash, self.ema = name, model_hash, ema
        self.precision = precision_of(unet)
        _check_fit("text embeddings", text_encoder.embedding_width, unet.config.cross_attention_dim)
        _check_fit("latent channels", vae.config.latent_channels, unet.config.out_channels)

    @classmethod
    def load(
        cls,
        source: str | os.PathLike[str] | None = None,
        *,
        device: str = "auto",
        precision: str = "auto",
        ema: bool = False,
        prediction_type: str | None = None,
    ) -> Pipeline:
        """Load a model.

        Args:
            source: a folder in the diffusers layout, a hub id, or a single file; None is the embedded model.
            device: "auto", "cpu", "cuda", "cuda:N" or "mps"; see `pick_device`.
            precision: "auto", "fp32", "bf16" or "fp16"; see `pick_precision`.
            ema: take the averaged weights of a `.ckpt` that holds both.
            prediction_type: what the U-Net predicts, "epsilon", "v_prediction" or "sample", where the model
                does not say or says it wrong.

        Raises:
            CheckpointError: there is no model there, or it is damaged or of another kind.
            UsageError: this machine has no such device.
        """
        from latentdiff.checkpoints import load_components

        where = pick_device(device)
        found = load_components(source or embedded_model(), ema=ema, prediction_type=prediction_type)
        size = sum(parameter.numel() for parameter in found.unet.parameters())
        return cls.from_components(found, ema=ema).to(where, pick_precision(precision, where, size))

    @classmethod
    def from_components(cls, parts: Components, *, ema: bool = False) -> Pipeline:
        """A pipeline of parts that are loaded already, as they are: nothing is copied, moved or converted."""
        return cls(
            parts.tokenizer,
            parts.text_encoder,
            parts.unet,
            parts.vae,
            parts.schedule_config,
            name=parts.name,
            model_hash=parts.hash,
            ema=ema,
        )

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the model as a folder in the diffusers layout, in the precision that it has here."""
        from latentdiff.checkpoints import Components, save_folder

        parts = Components(
            self.tokenizer,
            self.text_encoder,
            self.unet,
            self.vae,
            self.schedule.config,
            self.name,
            self.model_hash,
        )
        save_folder(parts, folder)

    def to(self, device: torch.device | str, precision: Precision | str | None = None) -> Pipeline:
        """Move the model to `device`, and to `precision` if one is given ("fp32", "bf16", "fp16")."""
        if precision is not None:
            self.precision = FORMATS[precision] if isinstance(precision, str) else precision
        for part in ("text_encoder", "unet", "vae"):
            getattr(self, part).to(device, getattr(self.precision, part))
        return self

    @property
    def default_size(self) -> tuple[int, int]:
        """Height and width in pixels of the pictures that the model was trained on."""
        side = self.unet.config.sample_size * self.vae.config.downscale
        return side, side

    @property
    def device(self) -> torch.device:
        """Where the model lies and latents are made."""
        return next(self.unet.parameters()).device

    @overload
    def __call__(self, prompt: str | Sequence[str], *, output: Literal["latents"], **options: Any) -> Tensor: ...

    @overload
    def __call__(self, prompt: str | Sequence[str], **options: Any) -> list[Image.Image]: ...

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        negative_prompt: str | Sequence[str] = "",
        steps: int = 25,
        guidance_scale: float = 5.0,
        guidance_rescale: float = 0.0,
        guidance_interval: tuple[float, float] | None = None,
        sampler: str = "ddim",
        eta: float = 0.0,
        seed: int | Sequence[int] | None = None,
        num_images: int = 1,
        height: int | None = None,
        width: int | None = None,
        batch_size: int | None = None,
        spacing: str | None = None,
        latents: Tensor | None = None,
        output: str = "images",
        callback: Callback | None = None,
        progress: bool = True,
    ) -> list[Image.Image] | Tensor:
        """Make pictures of what the prompt says.

        Args:
            prompt: one prompt or several; "" is allowed.
            negative_prompt: what to avoid, one for all prompts or one each.
            steps: denoising steps, 1 to the number of training timesteps.
            guidance_scale: 1 follows the prompt alone, more emphasizes it over the negative prompt.
            guidance_rescale: 0 to 1, see `Guidance`.
            guidance_interval: the noise levels sigma/alpha (low, high] at which guidance acts; None is all.
            sampler: "ddim", "ddpm", "euler" or "dpmpp-2m".
            eta: 0 to 1, the share of fresh noise in the steps of "ddim".
            seed: of the first picture, picture i has seed + i; or a list with one for each. None draws one,
                which the recipe reports.
            num_images: pictures of each prompt, one prompt after the other.
            height, width: in pixels, multiples of the VAE's factor (8); None is the size of the training.
            batch_size: how many pictures are made at once; changes memory and speed, not the pictures.
            spacing: "leading", "trailing" or "linspace"; None is what the model says.
            latents: unit normal start noise (N, C, h, w) in place of that of the seeds.
            output: "images", or "latents" for what the VAE would decode, a tensor (N, C, h, w).
            callback: called as `callback(step, t, x0)` after each step of each batch; see `Callback`.
            progress: show a progress bar on a terminal or in a notebook.

        Returns:
            PIL images with their recipe in `image.info`, to be saved with `latentdiff.image.save_png`; or latents.

        Raises:
            UsageError: an argument outside its domain.
            NotFiniteError: the model gives NaN or infinity.
            Cancelled: the callback returned False.
        """
        prompts, negatives = _one_per_picture(prompt, negative_prompt, num_images)
        seeds = _seeds(seed, len(prompts))
        shape = self._latent_shape(height, width, latents, len(prompts))
        guidance = _guidance(guidance_scale, guidance_rescale, guidance_interval)
        method = get_sampler(sampler, eta=eta)
        levels = method.levels(self.schedule, steps, spacing)
        start_scale = method.start_scale(self.schedule, spacing)
        batches = _batches(len(prompts), batch_size)
        if output not in ("images", "latents"):
            raise UsageError(f"expected output 'images' or 'latents', found {output!r}")

        with _explained_out_of_memory(), _progress_bar(steps * len(batches), progress) as bar:
            positive = self.encode(prompts)
            negative = self.encode(negatives) if guidance.scale != 1.0 else None
            finished = []
            for batch in batches:
                noise = NoiseStream(seeds[batch], shape, device=self.device)
                x = noise()
                if latents is not None:
                    x = latents[batch].to(x)
                denoiser = self._denoiser(positive, negative, batch, guidance, levels)
                for step in denoise(denoiser, start_scale * x, levels, method.step, noise=noise):
                    bar.update()
                    _report(step, callback)
                finished.append(step.x)
            if output == "latents":
                return torch.cat(finished)
            images = [image for x in finished for image in to_pil(self.decode(x))]

        recipe = Recipe(
            prompt="",
            seed=0,
            steps=steps,
            sampler=sampler,
            eta=eta,
            guidance_scale=guidance_scale,
            guidance_rescale=guidance_rescale,
            guidance_interval=guidance_interval,
            spacing=spacing or self.schedule.config.timestep_spacing,
            width=images[0].width,
            height=images[0].height,
            given_latents=latents is not None,
            **self._about(),
        )
        for image, *own in zip(images, prompts, negatives, seeds, strict=True):
            texts = dict(zip(("prompt", "negative_prompt", "seed"), own, strict=True))
            image.info.update(replace(recipe, **texts).to_chunks())
        return images

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Embed prompts: (N, L, C), float32. Each distinct text is encoded once, alone."""
        distinct = {text: self._encode_one(text) for text in dict.fromkeys(prompts)}
        return torch.cat([distinct[text] for text in prompts])

    def _encode_one(self, text: str) -> Tensor:
        token_ids = tokenize(self.tokenizer, [text]).to(self.device)  # (1, L)
        return finite_or_float32(
            "the text encoder", self.text_encoder, lambda _: self.text_encoder(token_ids), where=f"on {text!r}"
        ).float()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents (N, C, h, w) to pictures (N, 3, H, W), about in [-1, 1], float32, one at a time."""
        return torch.cat([self._decode_one(latent) for latent in latents.split(1)])

    def _decode_one(self, latent: Tensor) -> Tensor:
        def compute(dtype: torch.dtype, tiled: bool = False) -> Tensor:
            return self.vae.decode(latent.to(self.device, dtype), tiled=tiled)

        try:
            image = finite_or_float32("the VAE's decoder", self.vae, compute)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            warnings.warn("not enough memory to decode the picture whole; decoding it in tiles", stacklevel=2)
            image = finite_or_float32("the VAE's decoder", self.vae, partial(compute, tiled=True))
        return image.float()

    def _denoiser(
        self, positive: Tensor, negative: Tensor | None, batch: slice, guidance: Guidance, levels: list[Level]
    ) -> Denoiser:
        """The U-Net with the text of one batch, as a denoiser; each step's output is checked."""
        step_of = {level.t: f"step {number} of {len(levels) - 1}" for number, level in enumerate(levels, 1)}

        def model(x: Tensor, t: float, text: _Text) -> Tensor:
            def compute(dtype: torch.dtype) -> Tensor:
                return self.unet(x.to(dtype), t, text.context(dtype))

            return finite_or_float32("the U-Net", self.unet, compute, where=f"at {step_of.get(t, t)}")

        return guided_denoiser(
            model,
            parameterization(self.schedule.config.prediction_type),
            _Text.of(self.unet, positive[batch]),
            None if negative is None else _Text.of(self.unet, negative[batch]),
            guidance,
        )

    def _latent_shape(self, height: int | None, width: int | None, latents: Tensor | None, count: int) -> tuple[int, int, int]:
        """(C, h, w) of one picture's latents, from the size asked for, that of `latents`, or the training's."""
        channels, factor = self.vae.config.latent_channels, self.vae.config.downscale
        if self.unet.config.in_channels != channels:
            raise UsageError(
                f"expected a text-to-image model with {channels} U-Net input channels, found "
                f"{self.unet.config.in_channels}: this model is for inpainting and needs a picture and a mask"
            )
        given = (None, None) if latents is None else tuple(factor * side for side in latents.shape[-2:])
        choices = zip((height, width), given, self.default_size, strict=True)
        size = [next(side for side in sides if side is not None) for sides in choices]
        for name, side in zip(("height", "width"), size, strict=True):
            if side <= 0 or side % factor:
                raise UsageError(f"expected a {name} that is a positive multiple of {factor}, found {side}")
        shape = (channels, size[0] // factor, size[1] // factor)
        if latents is not None and latents.shape != (count, *shape):
            raise UsageError(f"expected latents of shape {(count, *shape)}, found {tuple(latents.shape)}")
        return shape

    def _about(self) -> dict[str, Any]:
        """What every recipe says about the model and where it ran."""
        import transformers

        return {
            "model": self.name,
            "model_hash": self.model_hash,
            "ema": self.ema,
            "prediction_type": self.schedule.config.prediction_type,
            "precision": self.precision.name,
            "device": describe_device(self.device),
            "versions": {
                "latentdiff": __version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
        }


@dataclass(frozen=True)
class _Text:
    """Prompts on their way through the U-Net: embeddings (N, L, C) and what its cross-attentions make of them."""

    embeddings: Tensor
    projected: ProjectedContext
    dtype: torch.dtype

    @classmethod
    def of(cls, unet: UNet, embeddings: Tensor) -> _Text:
        dtype = next(unet.parameters()).dtype
        return cls(embeddings, unet.project_context(embeddings.to(dtype)), dtype)

    @classmethod
    def cat(cls, texts: list[_Text]) -> _Text:
        projected = ProjectedContext.cat([text.projected for text in texts])
        return cls(torch.cat([text.embeddings for text in texts]), projected, texts[0].dtype)

    def context(self, dtype: torch.dtype) -> Tensor | ProjectedContext:
        """For a U-Net in `dtype`: the projections, or the embeddings if those were made in another one."""
        return self.projected if dtype == self.dtype else self.embeddings.to(dtype)


def _one_per_picture(
    prompt: str | Sequence[str], negative_prompt: str | Sequence[str], num_images: int
) -> tuple[list[str], list[str]]:
    prompts, negatives = as_list(prompt), as_list(negative_prompt)
    if len(negatives) == 1:
        negatives = negatives * len(prompts)
    if len(negatives) != len(prompts):
        raise UsageError(f"expected one negative prompt or {len(prompts)}, one for each prompt, found {len(negatives)}")
    if num_images < 1:
        raise UsageError(f"expected num_images of 1 or more, found {num_images}")
    return tuple([text for text in texts for _ in range(num_images)] for texts in (prompts, negatives))


def _seeds(seed: int | Sequence[int] | None, count: int) -> list[int]:
    if seed is None:
        seed = secrets.randbelow(2**32)
    if isinstance(seed, Integral):
        return [int(seed) + i for i in range(count)]
    if len(seed) != count:
        raise UsageError(f"expected one seed or {count}, one for each picture, found {len(seed)}")
    return [int(own) for own in seed]


def _guidance(scale: float, rescale: float, interval: tuple[float, float] | None) -> Guidance:
    if interval is None:
        return Guidance(scale=scale, rescale=rescale)
    if not all(map(math.isfinite, interval)):
        raise UsageError(f"expected a guidance interval of two finite noise levels, found {interval}")
    return Guidance(scale=scale, rescale=rescale, interval=tuple(interval))


def _batches(count: int, batch_size: int | None) -> list[slice]:
    size = DEFAULT_BATCH_SIZE if batch_size is None else batch_size
    if size < 1:
        raise UsageError(f"expected a batch size of 1 or more, found {size}")
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def _report(step: DenoiseStep, callback: Callback | None) -> None:
    if callback is not None and callback(step.index, step.level.t, step.prediction.x0) is False:
        raise Cancelled(f"cancelled by the callback after step {step.index + 1} of {step.steps}")


def _progress_bar(total: int, show: bool) -> tqdm:
    return tqdm(total=total, unit="step", disable=None if show else True, leave=False)


@contextmanager
def _explained_out_of_memory() -> Iterator[None]:
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise LatentDiffError(
            "not enough memory for this picture; try --batch-size 1, a smaller --width and --height, "
            "--precision bf16, or --attention sliced"
        ) from error


def _check_fit(what: str, found: int, expected: int) -> None:
    if found != expected:
        raise CheckpointError(f"the model's parts do not fit: the U-Net expects {expected} {what}, found {found}")
