"""Text to image: the way from a prompt to a picture on one page.

    prompt -> tokens -> embeddings ┐
    seed   -> start noise ---------┴-> denoise loop (schedule, sampler, guidance, U-Net) -> VAE -> image

Rombach et al. 2022, "High-Resolution Image Synthesis with Latent Diffusion Models".
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from PIL import Image
from torch import Tensor

from latentdiff.attention import attention_backend
from latentdiff.coding import decode_latents, embed_prompt, encode_pictures
from latentdiff.conditioning import TextContext, checked_model
from latentdiff.config import ScheduleConfig
from latentdiff.deepcache import UNCACHED, CacheSettings, DeepCache
from latentdiff.denoise import denoise
from latentdiff.device import (
    FORMATS,
    Precision,
    describe_device,
    explained_out_of_memory,
    pick_device,
    pick_precision,
    precision_of,
)
from latentdiff.embedded import embedded_model
from latentdiff.engines import Decoder, Network
from latentdiff.engines.choosing import engines_for
from latentdiff.engines.cpu import accelerate
from latentdiff.errors import CheckpointError, UsageError
from latentdiff.guidance import Guidance, guided_denoiser
from latentdiff.image import to_pil
from latentdiff.latents import NoiseStream
from latentdiff.lora.loaded import LoadedLoRAs
from latentdiff.lora.words import LoadedWords, is_word_file
from latentdiff.memory.estimate import decoding_bytes, denoising_bytes
from latentdiff.memory.residence import Residence
from latentdiff.parameterization import Denoiser, parameterization
from latentdiff.progress import Callback, progress_bar, report
from latentdiff.recipe import Recipe, library_versions
from latentdiff.request import Plan, Sampling, latent_shape
from latentdiff.schedule import Level, Schedule
from latentdiff.unet import UNet
from latentdiff.vae import VAE, LatentDistribution

if TYPE_CHECKING:
    from latentdiff.checkpoints import Components
    from latentdiff.lora.loading import LoadReport
    from latentdiff.text_encoder import TextEncoder

EMBEDDED_NAME = "latentdiff-embedded"  # what recipes call the embedded model


@dataclass(frozen=True)
class Start:
    """Where a batch of pictures begins, and what else its walk needs."""

    x: Tensor  # (N, C, h, w), at the first level
    after_step: Callable[[Tensor, Level], Tensor] | None = None  # see `denoise`
    extra_channels: Tensor | None = None  # see `Pipeline.denoiser`


class Pipeline:
    """A text-to-image model: tokenizer, text encoder, U-Net, VAE and noise schedule, each usable alone.

    Args:
        tokenizer: a `Tokenizer`, or one of transformers.
        text_encoder: token ids (N, L) -> embeddings (N, L, C).
        name, model_hash, ema: what recipes say about the model.
        stored: the weights of parts that are on the meta device, see `Residence`; they are read at their first use.
        low_memory: see `load`.

    Attributes:
        parts: which of the networks are in memory; `parts.keep` says how long they stay there.

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
        stored: Mapping[str, Mapping[str, Tensor]] | None = None,
        low_memory: bool = False,
    ) -> None:
        self.tokenizer = tokenizer
        self.parts = Residence({"text_encoder": text_encoder, "unet": unet, "vae": vae}, stored or {}, low_memory=low_memory)
        self._network: Network | None = None
        self._decoder: Decoder | None = None
        self.schedule = Schedule(schedule_config)
        self.name, self.model_hash, self.ema = name, model_hash, ema
        self.precision = precision_of(unet)
        self.backend = "torch"
        self.loras = LoadedLoRAs(unet, text_encoder)
        self.words = LoadedWords(tokenizer, text_encoder)
        _check_fit("text embeddings", text_encoder.embedding_width, unet.config.cross_attention_dim)
        _check_fit("latent channels", vae.config.latent_channels, unet.config.out_channels)
        _check_inputs(unet.config.in_channels, vae.config.latent_channels)

    @classmethod
    def load(
        cls,
        source: str | os.PathLike[str] | None = None,
        *,
        device: str = "auto",
        precision: str = "auto",
        ema: bool = False,
        prediction_type: str | None = None,
        backend: str = "torch",
        low_memory: bool = False,
    ) -> Pipeline:
        """Load a model. Each part's weights are read when it is first used.

        Args:
            source: a folder in the diffusers layout, a hub id, or a single file; None is the embedded model.
            device: "auto", "cpu", "cuda", "cuda:N" or "mps"; see `pick_device`.
            precision: "auto", "fp32", "bf16", "fp16" or "int8"; see `pick_precision`.
            backend: "torch", "openvino" or "compile"; see `use_backend`.
            ema: take the averaged weights of a `.ckpt` that holds both.
            prediction_type: what the U-Net predicts, "epsilon", "v_prediction" or "sample", where the model
                does not say or says it wrong.
            low_memory: keep only the part that is used, of the U-Net only two blocks at a time, and decode pictures that
                are larger than those of the training in tiles. Slower; the picture is otherwise the same.

        Raises:
            CheckpointError: there is no model there, or it is damaged or of another kind.
            UsageError: this machine has no such device.
        """
        from latentdiff.checkpoints import load_components

        where = pick_device(device)
        found = load_components(source or embedded_model(), ema=ema, prediction_type=prediction_type, weights=False)
        if source is None:
            found.name = EMBEDDED_NAME
        size = sum(parameter.numel() for parameter in found.unet.parameters())
        pipe = cls.from_components(found, ema=ema, low_memory=low_memory)
        return pipe.to(where, pick_precision(precision, where, size)).use_backend(backend)

    @classmethod
    def from_components(cls, parts: Components, *, ema: bool = False, low_memory: bool = False) -> Pipeline:
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
            stored=parts.stored,
            low_memory=low_memory,
        )

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the model as a folder in the diffusers layout, in the precision that it has here, without its LoRAs."""
        from latentdiff.checkpoints import Components, save_folder

        self.parts.require_whole("saving")
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
        """Move the model to `device`, and to `precision` if one is given ("fp32", "bf16", "fp16", "int8").

        On a CPU the modules get their fast forms, see `latentdiff.engines.cpu`.
        """
        if precision is not None:
            self.precision = FORMATS[precision] if isinstance(precision, str) else precision
        self.parts.to(device, self.precision)
        if self.device.type == "cpu":
            for name in ("text_encoder", "unet", "vae"):
                accelerate(self.parts.module(name))
        self.loras.to(device, self.precision)
        self.words.to(device)
        return self.use_backend(self.backend)

    def use_backend(self, name: str) -> Pipeline:
        """Compute the U-Net and the decoder by the back end `name` from now on; the modules stay as they are.

        "torch" is the modules themselves. "openvino" and "compile" translate them at the first picture of each size; the
        first is for CPUs, the second mostly for GPUs. Their pictures are those of the modules up to rounding. Where a LoRA or
        another tap is on a module, or gradients are needed, they leave it to the modules or say that they cannot.

        Raises:
            UsageError: there is no such back end, or it cannot compute this model here.
            MissingDependencyError: what it needs is not installed.
        """
        if name != "torch" or self.precision.name == "int8":
            self.parts.require_whole(f"the back end {name} in {self.precision.name}")
        self.network, self.decoder = engines_for(name, self.precision.name, self.parts.module("unet"), self.parts.module("vae"))
        self.backend = name
        return self

    def load_lora(
        self,
        path: str | os.PathLike[str],
        scale: float = 1.0,
        name: str | None = None,
        *,
        allow_partial: bool = False,
    ) -> LoadReport | str:
        """Adapt the model by a LoRA file; several act at once. The model's own weights stay as they are.

        Args:
            path: in the dialect of kohya's tools, of PEFT or of diffusers; or a folder that the last two wrote. The embedding
                of a word, as textual inversion makes it, is taken too; it has no scale.
            scale: strength; 1 is as trained.
            name: what `unload_lora` calls it; None is the path as it is given here.
            allow_partial: leave out what does not fit, as long as something does.

        Returns:
            A report that says "matched 264 of 264 layers".

        Raises:
            CheckpointError: there is no such file, it is damaged, no LoRA, or one for another model.
        """
        self.parts.ready("text_encoder"), self.parts.ready("unet")  # what is loaded goes where they lie
        if is_word_file(path):
            report = self.words.load(path, os.fspath(path) if name is None else name)
            self.tokenizer = self.words.tokenizer
            return report
        return self.loras.load(path, scale, name, allow_partial, self.precision)

    def unload_lora(self, name: str | None = None) -> None:
        """Take a LoRA off again, or all of them: pictures are as before, bit for bit."""
        is_word = name in self.words
        if is_word or name is None:
            self.words.unload(name)
            self.tokenizer = self.words.tokenizer
        if not is_word:
            self.loras.unload(name)

    def adaptations(self) -> list[dict[str, Any]]:
        """What recipes say of the LoRAs and words that are loaded."""
        return [*self.loras.describe(), *self.words.describe()]

    @property
    def text_encoder(self) -> TextEncoder:
        """Token ids (N, L) -> embeddings (N, L, C)."""
        return self.parts.ready("text_encoder")

    @property
    def unet(self) -> UNet:
        """Noisy latents, timestep and text -> raw prediction."""
        return self.parts.ready("unet")

    @property
    def vae(self) -> VAE:
        """Pictures to latents and back."""
        return self.parts.ready("vae")

    @property
    def network(self) -> Network:
        """What computes the U-Net: itself, or what an engine made of it; see `latentdiff.engines`."""
        return self._network or self.unet

    @network.setter
    def network(self, network: Network) -> None:
        self._network = None if network is self.parts.module("unet") else network

    @property
    def decoder(self) -> Decoder:
        """What computes `vae.decode`."""
        return self._decoder or self.vae.decode

    @decoder.setter
    def decoder(self, decoder: Decoder) -> None:
        self._decoder = None if decoder == self.parts.module("vae").decode else decoder

    @property
    def default_size(self) -> tuple[int, int]:
        """Height and width in pixels of the pictures that the model was trained on."""
        side = self.parts.module("unet").config.sample_size * self.parts.module("vae").config.downscale
        return side, side

    @property
    def device(self) -> torch.device:
        """Where the model lies and latents are made."""
        return self.parts.device

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
        fast: bool = False,
        steps: int | None = None,
        guidance_scale: float | None = None,
        guidance_rescale: float = 0.0,
        guidance_interval: tuple[float, float] | None = None,
        sampler: str | None = None,
        eta: float = 0.0,
        cache_interval: int | None = None,
        cache_branch: int | None = None,
        cache_centre: int | None = None,
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
            fast: nearly the same picture in a fraction of the time; takes what `request.FAST` says for options not given.
            steps: denoising steps, 1 to the number of training timesteps; 25 if not given.
            guidance_scale: 1 follows the prompt alone, more emphasizes it over the negative prompt; 5 if not given.
            guidance_rescale: 0 to 1, see `Guidance`.
            guidance_interval: the noise levels sigma/alpha (low, high] at which guidance acts; None is all.
            sampler: "ddim" (if not given), "ddpm", "euler", "dpmpp-2m" or "unipc".
            eta: 0 to 1, the share of fresh noise in the steps of "ddim".
            cache_interval, cache_branch, cache_centre: compute the deep layers at only every so many steps; see
                `CacheSettings`. An interval of 1, which is what is not given, computes all.
            seed: of the first picture, picture i has seed + i; or a list with one for each. None draws one,
                which the recipe reports.
            num_images: pictures of each prompt, one prompt after the other.
            height, width: in pixels, multiples of the VAE's factor (8); None is the size of the training.
            batch_size: how many pictures are made at once; changes memory and speed, not the pictures.
            spacing: "leading", "trailing" or "linspace" in timesteps; "karras", "uniform-lambda" or "ays" in noise; None is
                what the model says.
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
        options = Sampling(
            negative_prompt=negative_prompt,
            fast=fast,
            steps=steps,
            guidance_scale=guidance_scale,
            guidance_rescale=guidance_rescale,
            guidance_interval=guidance_interval,
            sampler=sampler,
            eta=eta,
            cache_interval=cache_interval,
            cache_branch=cache_branch,
            cache_centre=cache_centre,
            seed=seed,
            num_images=num_images,
            batch_size=batch_size,
            spacing=spacing,
            callback=callback,
            progress=progress,
        )
        plan = options.plan(prompt, self.schedule)
        self.check_text_to_image()
        shape = latent_shape((height, width), self.default_size, self.parts.module("vae").config, latents, len(plan.prompts))
        if output not in ("images", "latents"):
            raise UsageError(f"expected output 'images' or 'latents', found {output!r}")

        def start(part: slice, noise: NoiseStream) -> Start:
            x = noise()  # drawn even if it is given, so that later draws do not depend on that
            return Start(plan.start_scale * (x if latents is None else latents[part].to(x)))

        made = self.sample(plan, shape, start)
        if output == "latents":
            return made
        images = to_pil(self.decode(made))
        for image, fields in zip(images, plan.recipe_fields(), strict=True):
            own = self.recipe(**fields, width=image.width, height=image.height, given_latents=latents is not None)
            image.info.update(own.to_chunks())
        return images

    @torch.no_grad()
    @explained_out_of_memory()
    def sample(
        self,
        plan: Plan,
        shape: tuple[int, int, int],
        start: Callable[[slice, NoiseStream], Start],
        *,
        text: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Walk the pictures of a plan, batch by batch, from where `start` puts them down to clean latents (N, C, h, w).

        Args:
            shape: (C, h, w), of the noise of one picture.
            start: (pictures of the batch, their noise) -> where they begin, at the first level of the plan.
            text: embeddings (N, L, C) to follow and to avoid, in place of those of the plan's prompts.

        Raises:
            NotFiniteError: the model gives NaN or infinity.
            Cancelled: the callback returned False.
        """
        rows = 2 * max(part.stop - part.start for part in plan.parts)
        job = self.parts.job(rows, *shape[-2:], quadratic=attention_backend() == "plain")
        self.parts.check(job)
        positive, negative = text or self.encode([*plan.prompts, *plan.negatives]).chunk(2)
        self.parts.make_room("unet", denoising_bytes(job))
        finished = []
        with self.parts.using("unet"), progress_bar(plan.steps * len(plan.parts), plan.options.progress) as bar:
            for part in plan.parts:
                noise = NoiseStream(plan.seeds[part], shape, device=self.device)
                begun = start(part, noise)
                denoiser = self.denoiser(
                    positive[part],
                    negative[part],
                    plan.guidance,
                    plan.levels,
                    extra_channels=begun.extra_channels,
                    cache=plan.cache,
                )
                steps = denoise(denoiser, begun.x, plan.levels, plan.sampler.step, noise=noise, after_step=begun.after_step)
                for step in steps:
                    bar.update()
                    report(step, plan.options.callback)
                finished.append(step.x)
        return torch.cat(finished)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Embed prompts: (N, L, C), float32. Each distinct text is encoded once, alone."""
        distinct = {text: embed_prompt(self.tokenizer, self.text_encoder, text, self.device) for text in dict.fromkeys(prompts)}
        return torch.cat([distinct[text] for text in prompts])

    @torch.no_grad()
    @explained_out_of_memory()
    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents (N, C, h, w) to pictures (N, 3, H, W), about in [-1, 1], float32, one at a time."""
        job = self.parts.job(1, *latents.shape[-2:])
        self.parts.make_room("vae", decoding_bytes(job))
        return decode_latents(self.decoder, self.vae, latents, self.device, tiled=job.is_tiled)

    @torch.no_grad()
    @explained_out_of_memory()
    def encode_images(self, images: Tensor) -> LatentDistribution:
        """Latents of pictures (N, 3, H, W) in [-1, 1], float32; H and W are multiples of the VAE's factor."""
        return encode_pictures(self.vae, images, self.device)

    def denoiser(
        self,
        positive: Tensor,
        negative: Tensor,
        guidance: Guidance,
        levels: Sequence[Level],
        *,
        extra_channels: Tensor | None = None,
        cache: CacheSettings = UNCACHED,
    ) -> Denoiser:
        """The U-Net that follows one batch of text, as a function of latents and level.

        Args:
            positive, negative: embeddings (N, L, C) of the prompts and of what to avoid.
            levels: what will be walked; errors name the step by it.
            extra_channels: (N, E, h, w), what an inpainting U-Net sees after the latents.
            cache: for a denoiser that is called once a step; others have to compute all.
        """
        network = self.network
        if cache.interval > 1:
            network = DeepCache(network, self.unet, cache, len(levels) - 1)
        return guided_denoiser(
            checked_model(network, self.unet, levels, extra_channels=extra_channels),
            parameterization(self.schedule.config.prediction_type),
            TextContext.of(self.unet, positive),
            TextContext.of(self.unet, negative),
            guidance,
        )

    def recipe(self, **fields: Any) -> Recipe:
        """A recipe with these fields, and what is to be said about the model and where it runs."""
        return Recipe(
            model=self.name,
            model_hash=self.model_hash,
            ema=self.ema,
            prediction_type=self.schedule.config.prediction_type,
            precision=self.precision.name,
            backend=self.backend,
            device=describe_device(self.device),
            versions=library_versions(),
            loras=self.adaptations(),
            **fields,
        )

    @property
    def is_for_inpainting(self) -> bool:
        """Whether the U-Net sees, after the latents, a mask and the latents of the picture under it."""
        return self.parts.module("unet").config.in_channels == 2 * self.parts.module("vae").config.latent_channels + 1

    def check_text_to_image(self) -> None:
        """Raise a UsageError if the model cannot do without a picture and a mask."""
        if self.is_for_inpainting:
            latent, found = self.vae.config.latent_channels, self.unet.config.in_channels
            raise UsageError(
                f"expected a text-to-image model with {latent} U-Net input channels, found {found}: this model is for "
                "inpainting and needs a picture and a mask"
            )


def _check_fit(what: str, found: int, expected: int) -> None:
    if found != expected:
        raise CheckpointError(f"the model's parts do not fit: the U-Net expects {expected} {what}, found {found}")


def _check_inputs(found: int, latent: int) -> None:
    if found not in (latent, 2 * latent + 1):
        raise CheckpointError(
            f"expected a U-Net with {latent} input channels, or {2 * latent + 1} for inpainting (latents, mask and masked "
            f"latents), found {found}: models that take other inputs are not supported"
        )
