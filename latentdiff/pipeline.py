"""Text to image: the way from a prompt to an image on one page.

    prompt -> tokens -> embeddings ┐
    seed   -> start noise ---------┴-> denoise loop (schedule, sampler, guidance, U-Net) -> VAE -> image

Rombach et al. 2022, "High-Resolution Image Synthesis with Latent Diffusion Models".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, Unpack, cast, overload

import torch
from PIL import Image
from torch import Tensor

from latentdiff.diffusion.denoise import denoise, progress_bar, report
from latentdiff.diffusion.guidance import Guidance
from latentdiff.diffusion.latents import NoiseStream
from latentdiff.diffusion.parameterization import Denoiser, Prediction, parameterization
from latentdiff.diffusion.schedule import Level
from latentdiff.diffusion.thresholding import thresholded
from latentdiff.engines.deepcache import UNCACHED, CacheSettings, DeepCache
from latentdiff.image import to_pil, to_tensor
from latentdiff.model.loaded import LoadedModel
from latentdiff.model.memory.estimate import decoding_bytes, denoising_bytes
from latentdiff.model.memory.sharing import one_use
from latentdiff.networks.attention import attention_backend
from latentdiff.networks.conditioning import Applied
from latentdiff.networks.device import explained_out_of_memory
from latentdiff.networks.sizes import Told
from latentdiff.networks.steering import checked_model, prompted_denoiser
from latentdiff.networks.text_embedding import EncodedPrompt, Given
from latentdiff.networks.vae import LatentDistribution, decode_latents, encode_images, latent_shape
from latentdiff.request.calls import public
from latentdiff.request.domains import Choice, refusal
from latentdiff.request.options import SECOND_PASS, GenerateOptions, SamplingOptions
from latentdiff.request.plan import Plan, Sampling, Start
from latentdiff.request.second_pass import LATENT_MODES, SecondPass, enlarged_latents, noised

if TYPE_CHECKING:
    from latentdiff.networks.regional import Regions
    from latentdiff.networks.windows import Windows


def _tensor(name: str, value: object) -> Tensor:
    if not isinstance(value, Tensor):
        raise refusal(name, "a tensor", value)
    return value


Texts = Tensor | Sequence[EncodedPrompt]  # embeddings (N, L, C), or what each image is told


class Pipeline(LoadedModel):
    """A text-to-image model, and what it can be asked for; `LoadedModel` says how it is loaded, moved and adapted."""

    @overload
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        latents: Tensor | None = None,
        output: Literal["latents"],
        **options: Unpack[GenerateOptions],
    ) -> Tensor: ...

    @overload
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        latents: Tensor | None = None,
        output: Literal["images"] = "images",
        **options: Unpack[GenerateOptions],
    ) -> list[Image.Image]: ...

    @public(
        GenerateOptions,
        prompt_embeds=_tensor,
        negative_prompt_embeds=_tensor,
        latents=_tensor,
        output=Choice(("images", "latents")),
    )
    @one_use()
    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        latents: Tensor | None = None,
        output: Literal["images", "latents"] = "images",
        **options: Unpack[GenerateOptions],
    ) -> list[Image.Image] | Tensor:
        """Make images of what the prompt says.

        Args:
            prompt: one prompt or several; "" is allowed. `prompt_syntax` says how they are read.
            prompt_embeds: (N, L, C) in place of prompts, as diffusers names it; `encode` makes them.
            negative_prompt_embeds: (N, L', C), or one for all, in place of negative prompts.
            latents: unit normal start noise (N, C, h, w) in place of that of the seeds.
            output: "images", or "latents" for what the VAE would decode, a tensor (N, C, h, w).
            options: see `GenerateOptions`: steps, guidance_scale, negative_prompt, sampler, seed, num_images, width,
                height, callback, ...

        Returns:
            PIL images with their recipe in `image.info`, to be saved with `save_png`; or latents.

        Raises:
            UsageError: there is no such option, or a value outside its domain.
            NotFiniteError: the model gives NaN or infinity.
            Cancelled: the callback returned False.
        """
        size = options.pop("height", None), options.pop("width", None)
        axes = cast(str | None, options.pop("seamless", None))
        second = SecondPass.taken_from(cast(dict[str, Any], options)) if options.keys() & SECOND_PASS else None
        sampling = Sampling(**cast(SamplingOptions, options))
        given = Given.of(prompt, sampling.negative_prompt, prompt_embeds, negative_prompt_embeds)
        plan = replace(sampling.plan(given.prompts, self.schedule), around=axes or "")
        self.check_text_to_image()
        shape = latent_shape(size, self.default_size, self.residence.module("vae").config, latents, len(plan.prompts))

        def start(part: slice, noise: NoiseStream) -> Start:
            x = noise()  # drawn even if it is given, so that later draws do not depend on that
            return Start(plan.start_scale * (x if latents is None else latents[part].to(x)))

        width = self.residence.module("unet").config.cross_attention_dim
        chunk = self.text_encoder.context_length if given.is_given and self.told_count else None
        text = given.instead_of(self.encoded(plan), width, chunk) if given.is_given else None
        larger = second and second.plan(plan, self.schedule)
        with self.going_around(plan):
            made = self.sample(plan, shape, start, text=text)
            if second and larger:
                made = self._second_pass(made, second, larger, text)
            if output == "latents":
                return made
            images = to_pil(self.decode(made, tile=plan.options.vae_tile))
        factor = self.residence.module("vae").config.downscale
        for image, fields in zip(images, plan.recipe_fields(), strict=True):
            own = self.recipe(
                **fields,
                **(second.fields() if second else {}),
                seamless=axes,
                width=shape[2] * factor,
                height=shape[1] * factor,
                given_latents=latents is not None,
                given_embeddings=given.is_given,
            )
            image.info.update(own.to_chunks())
        return images

    def _second_pass(self, latents: Tensor, asked: SecondPass, plan: Plan, text: tuple[Texts, Texts] | None) -> Tensor:
        """Latents (N, C, h, w) of a first pass enlarged, noised and walked down again."""
        factor = self.residence.module("vae").config.downscale
        size = asked.size(latents.shape[2] * factor, latents.shape[3] * factor, factor)
        if asked.hires_upscaler in LATENT_MODES:
            latents = enlarged_latents(latents, asked.hires_upscaler, size)
        else:
            from latentdiff.networks.upscaling.second_pass import enlarged

            tile, pixels = plan.options.vae_tile, (size[1] * factor, size[0] * factor)
            images = enlarged(to_pil(self.decode(latents, tile=tile)), asked, pixels, self.device)
            latents = torch.cat([self.encode_images(to_tensor([image]), tile=tile).mode() for image in images])

        def start(part: slice, noise: NoiseStream) -> Start:
            return Start(noised(latents[part], noise(), plan.levels[0]))

        return self.sample(plan, (latents.shape[1], *size), start, text=text)

    @one_use()
    @torch.no_grad()
    @explained_out_of_memory()
    def sample(
        self,
        plan: Plan,
        shape: tuple[int, int, int],
        start: Callable[[slice, NoiseStream], Start],
        *,
        text: tuple[Texts, Texts] | None = None,
    ) -> Tensor:
        """Walk the images of a plan, batch by batch, from where `start` puts them down to clean latents (N, C, h, w).

        Args:
            shape: (C, h, w), of the noise of one image.
            start: (images of the batch, their noise) -> where they begin, at the first level of the plan.
            text: what to follow and to avoid, in place of the plan's prompts; see `denoiser`.

        Raises:
            NotFiniteError: the model gives NaN or infinity.
            Cancelled: the callback returned False.
        """
        made: list[Tensor] = []
        for first, piece in plan.pieces():

            def start_of(part: slice, noise: NoiseStream, first: int = first) -> Start:
                return start(slice(first + part.start, first + part.stop), noise)

            images = slice(first, first + len(piece.prompts))
            is_changed = bool(piece.loras or piece.options.taps() or piece.options.fast) or piece.cache.interval > 1
            offered = self.offered.attached(piece.loras, self.load_lora, self.unload_lora) if piece.loras else nullcontext()
            own = self.in_few_steps() if piece.options.fast else nullcontext()
            with self.in_use(alone=is_changed), offered, own:
                texts = text and (text[0][images], text[1][images])
                made.append(self._sample(piece, shape, start_of, texts))
        return torch.cat(made)

    def _sample(
        self,
        plan: Plan,
        shape: tuple[int, int, int],
        start: Callable[[slice, NoiseStream], Start],
        text: tuple[Texts, Texts] | None,
    ) -> Tensor:
        """`sample` of images whose prompts name the same LoRAs, which are attached."""
        rows = max(map(plan.rows, plan.batches))
        sizes = self.told_of_latents(shape, plan.sizes)
        options, steering = plan.options, self.steering(plan.options)
        is_cut = options.window or options.window_stride
        windows = self._windows(plan) if is_cut else None
        beside, before = (steering.beside, steering.before) if steering else ((), ())
        workload = self.residence.workload(
            rows, *shape[-2:], quadratic=attention_backend() == "plain", beside=beside, before=before,
            window=windows and windows.side, tile=options.vae_tile,
        )  # fmt: skip
        self.residence.check(workload)
        positive, negative = map(_as_prompts, text or self.encoded(plan))
        early = steering.early(shape, plan.levels) if steering else []
        regions = self.regions(plan, shape) if options.regions else None
        self.residence.make_room("unet", denoising_bytes(workload) + workload.beside)
        finished: list[Tensor] = []
        bar = progress_bar(plan.steps * len(plan.batches), options.progress)
        told = self.told_guidance(options.guidance_scale)
        around = self.latents_going_around(plan, windows.covers(*shape[-2:]) if windows else "xy")
        with self.residence.using("unet"), bar, told, self.factored(options.freeu), around:
            applied = [*early, *steering.controls(shape, plan.levels)] if steering else []
            for part in plan.batches:
                noise = NoiseStream(plan.seeds[part], shape, rule=plan.noise, device=self.device)
                begun = start(part, noise)
                denoiser = self.denoiser(
                    positive[part],
                    negative[part],
                    plan.guidance,
                    plan.levels,
                    extra_channels=begun.extra_channels,
                    sizes=begun.told or sizes,
                    controls=applied,
                    windows=windows,
                    regions=regions,
                    cache=plan.cache,
                    calls=plan.sampler.calls(plan.levels),
                )
                if plan.thresholding:
                    denoiser = thresholded(denoiser, plan.thresholding)
                x = begun.x
                for step in denoise(
                    denoiser, x, plan.levels, plan.sampler.step, noise=noise, after_step=begun.after_step
                ):
                    bar.update()
                    report(step, options.callback)
                    x = step.x
                finished.append(x)
        return torch.cat(finished)

    def _windows(self, plan: Plan) -> Windows | None:
        from latentdiff.request.windows import windows_of

        return windows_of(plan, self.residence.module("vae").config.downscale)

    @one_use()
    @torch.no_grad()
    @explained_out_of_memory()
    def decode(self, latents: Tensor, *, tile: int | None = None) -> Tensor:
        """Decode latents (N, C, h, w) to images (N, 3, H, W), about in [-1, 1], float32, one at a time.

        Args:
            tile: in overlapping tiles of so many pixels; None is whole, or as memory allows.
        """
        workload = self.residence.workload(1, *latents.shape[-2:], tile=tile)
        self.residence.make_room("vae", decoding_bytes(workload))
        return decode_latents(self.decoder, self.vae, latents, self.device, tile=workload.tile_in_use)

    @one_use()
    @torch.no_grad()
    @explained_out_of_memory()
    def encode_images(self, images: Tensor, *, tile: int | None = None) -> LatentDistribution:
        """Latents of images (N, 3, H, W) in [-1, 1], float32; H and W are multiples of the VAE's factor; `tile` as in
        `decode`."""
        return encode_images(self.vae, images, self.device, tile=tile)

    def denoiser(
        self,
        positive: Texts,
        negative: Texts,
        guidance: Guidance,
        levels: Sequence[Level],
        *,
        extra_channels: Tensor | None = None,
        sizes: Told | None = None,
        controls: Sequence[Applied] = (),
        windows: Windows | None = None,
        regions: Regions | None = None,
        cache: CacheSettings = UNCACHED,
        calls: int | None = None,
    ) -> Denoiser:
        """The U-Net that follows one batch of text, as a function of latents and level.

        Args:
            positive: the prompts, as embeddings (N, L, C) or one encoded prompt each.
            negative: what to avoid, likewise.
            levels: what will be walked; errors name the step by it.
            extra_channels: (N, E, h, w), what an inpainting U-Net sees after the latents.
            sizes: what a U-Net is told beside the texts, see `told` and `Start`.
            controls: what steers besides: controls, image prompts.
            windows: what the U-Net sees of the latents at once; None is all.
            regions: prompts for parts of the images.
            cache: for a denoiser that is called in the order of a walk; others have to compute all.
            calls: how often; None is once a level.
        """
        network = self.network
        if cache.interval > 1:
            network = DeepCache(network, self.unet, cache, calls or len(levels) - 1)
        model = checked_model(network, self.unet, levels)
        if windows:
            from latentdiff.networks.windows import windowed

            model = windowed(model, windows)
        predicts = parameterization(self.schedule.config.prediction_type)
        denoise = prompted_denoiser(
            self.unet, model, predicts, _as_prompts(positive), _as_prompts(negative), guidance, levels,
            extra_channels=extra_channels, sizes=sizes, controls=controls, regions=regions,
        )  # fmt: skip

        def in_use(x: Tensor, level: Level) -> Prediction:
            with self.in_use(alone=cache.interval > 1):
                return denoise(x, level)

        return in_use


def _as_prompts(texts: Texts) -> list[EncodedPrompt]:
    return EncodedPrompt.of(texts) if isinstance(texts, Tensor) else list(texts)
