"""What prompts mean to a model: their account, and their embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from latentdiff.control.applied import Steering, control_parts
from latentdiff.device import describe_device
from latentdiff.errors import UsageError
from latentdiff.memory.sharing import one_use
from latentdiff.model.loaded import LoadedModel
from latentdiff.networks.freeu import freeu
from latentdiff.networks.inputs import NEEDS, TEXT, VARIATIONS
from latentdiff.networks.kernels.choice import forms_in_use
from latentdiff.networks.regional import Regions
from latentdiff.networks.seamless import seamless
from latentdiff.networks.sizes import SizeOptions, Told
from latentdiff.networks.text_embedding import PLAIN, EncodedPrompt, PromptEncoder, Reading
from latentdiff.networks.told_guidance import told_guidance
from latentdiff.prompts.account import PromptAccount, account
from latentdiff.prompts.syntax import read_prompt
from latentdiff.recipe import Recipe, library_versions
from latentdiff.request.plan import Plan, Sampling


class PromptedModel(LoadedModel):
    """A model that reads prompts."""

    @torch.no_grad()
    def encoded(self, plan: Plan) -> tuple[list[EncodedPrompt], list[EncodedPrompt]]:
        """The prompts and negative prompts of a plan, one of each per image."""
        encoder = self.prompt_encoder(plan.reading)
        positive = {text: encoder.prompt(text, plan.steps) for text in dict.fromkeys(plan.prompts)}
        negative = {text: encoder.prompt(text, plan.steps, negative=True) for text in dict.fromkeys(plan.negatives)}
        return [positive[text] for text in plan.prompts], [negative[text] for text in plan.negatives]

    @torch.no_grad()
    def regions(self, plan: Plan, shape: Sequence[int]) -> Regions | None:
        """The regions of a plan on latents (..., h, w); None if all lie outside of what is made.

        Raises:
            UsageError: a region's prompt is composed or changes on the way, a mask is of other proportions, or edges or windows
                cannot be had with regions.
        """
        if plan.around or plan.options.window:
            other = "seamless, as their edges do not continue" if plan.around else "window, which sees parts of its own"
            raise UsageError(f"regions do not go with {other}; leave one of them out")
        encoder, unet = self.prompt_encoder(plan.reading), self.residence.module("unet").config
        factor = self.residence.module("vae").config.downscale
        texts = [encoder.simple(region.prompt) for region in plan.options.regions]
        maps = [region.map(*shape[-2:], factor) for region in plan.options.regions]
        return Regions.of(maps, texts, unet.sample_size // 2)

    @one_use()
    @torch.no_grad()
    def encode(self, prompts: Sequence[str], reading: Reading = PLAIN, *, negative: bool = False) -> Tensor:
        """Embed prompts that say one thing at all steps: (N, L, C), float32. Each distinct text is encoded once, alone.

        Where they have different numbers of chunks, empty chunks fill up the shorter ones. Models of SDXL have their
        pooled text in a row more, the last; see `latentdiff.networks.pooled`.

        Args:
            negative: they are what to avoid: of SDXL's base, zeros where they are empty.

        Raises:
            UsageError: a prompt is composed or changes on the way.
        """
        encoder = self.prompt_encoder(reading)
        return encoder.filled([encoder.simple(text, negative=negative) for text in prompts])

    def told_of_latents(
        self,
        shape: Sequence[int],
        options: SizeOptions = SizeOptions(),  # noqa: B008 - immutable
    ) -> Told | None:
        """`told` of an image with latents of this shape, (..., h, w)."""
        factor = self.residence.module("vae").config.downscale
        return self.told(shape[-2] * factor, shape[-1] * factor, options)

    def explain(
        self, prompt: str, *, prompt_syntax: str = "a1111", steps: int = 25, negative: bool = False
    ) -> PromptAccount:
        """What a prompt means to this model: tokens, weights, chunks, stages, and what has no meaning or is cut.

        Args:
            steps: over which stages are counted.
            negative: read it as a negative prompt.

        Returns:
            A value with all of it; `print` shows a table.

        Raises:
            UsageError: the prompt cannot be read.
        """
        return account(self.tokenizer, prompt, prompt_syntax, steps, negative=negative)

    def check_text_to_image(self, *others: str) -> None:
        """Raise a UsageError if the model needs more than a prompt, but for the kinds of inputs that a task has for it."""
        if self.inputs not in (TEXT, *others):
            config = self.residence.module("unet").config
            if self.inputs == VARIATIONS:
                raise UsageError(
                    f"expected a text-to-image model, found one of unCLIP: this model {NEEDS[self.inputs]}"
                )
            raise UsageError(
                f"expected a text-to-image model with {config.out_channels} U-Net input channels, found "
                f"{config.in_channels}: this model {NEEDS[self.inputs]}"
            )

    def prompt_encoder(self, reading: Reading = PLAIN) -> PromptEncoder:
        """What embeds prompts, and remembers them."""
        return PromptEncoder(self.tokenizer, self.text_encoder, self.device, reading)

    def recipe(self, **fields: Any) -> Recipe:
        """A recipe with these fields, and what is to be said about the model and where it runs."""
        tags = read_prompt(fields["prompt"], fields.get("prompt_syntax", "plain")).loras
        loaded = self.adaptations() if self.adapted_by else []
        named = self.offered.describe(tags) if tags else []
        own = [self.distilled.describe()] if fields.get("fast") and self.distilled else []
        return Recipe(
            model=self.name,
            model_hash=self.model_hash,
            parts=self.elsewhere,
            ema=self.ema,
            prediction_type=self.schedule.config.prediction_type,
            zero_terminal_snr=self.schedule.config.rescale_betas_zero_snr,
            precision=self.precision.name,
            backend=self.backend,
            device=describe_device(self.device),
            versions=library_versions() | ({"forms": forms} if (forms := forms_in_use()) else {}),
            loras=[*loaded, *named, *own],
            **fields,
        )

    def going_around(self, plan: Plan) -> AbstractContextManager[None]:
        """Inside, the VAE sees the edges of a plan's images continue; see `seamless`.

        Raises:
            UsageError: it cannot be had with the rest of what is asked for.
        """
        if not plan.around:
            return nullcontext()
        if self.backend != "torch" or self.precision.name == "int8" or self.residence.low_memory:
            raise UsageError("seamless needs the back end torch, another precision than int8, and no low memory")
        if plan.options.vae_tile:
            raise UsageError("seamless sees around the border of the whole image; leave vae_tile out")
        return seamless(plan.around, (self.residence.module("vae"),))

    def latents_going_around(self, plan: Plan, axes: str) -> AbstractContextManager[None]:
        """Inside, the U-Net and what steers it see them continue along those of `axes` that do."""
        along = "".join(axis for axis in plan.around if axis in axes)
        if not along:
            return nullcontext()
        beside = control_parts(plan.options.controls or (), self.residence, self.precision.unet)
        return seamless(along, (self.residence.module("unet"), *(part.module for part in beside)))

    def told_guidance(self, scale: float) -> AbstractContextManager[Any]:
        """Inside, a U-Net that is told the guidance scale is told this one.

        Raises:
            UsageError: the back end does not run the modules that are told.
        """
        if self.unet.config.time_cond_proj_dim is None:
            return nullcontext()
        if self.backend != "torch":
            raise UsageError(f"a model that is told the guidance scale needs the back end torch, found {self.backend}")
        return told_guidance(self.unet, scale)

    def factored(self, factors: Sequence[float] | None) -> AbstractContextManager[None]:
        """See `freeu`; of the U-Net."""
        return nullcontext() if factors is None else freeu(self.unet, factors)

    def steering(self, options: Sampling) -> Steering | None:
        """The controls and image prompts among the options, on this model; None if there are none.

        Raises:
            CheckpointError: one was made for another model.
            UsageError: the back end or the precision does not go with them, or with what else acts inside the U-Net.
        """
        engine = self.backend, self.precision.name
        if (taps := options.taps()) and (self.backend != "torch" or self.precision.name == "int8"):
            raise UsageError(f"{taps} need the back end torch and fp32, bf16 or fp16, found {' in '.join(engine)}")
        controls, prompts = options.controls or (), options.image_prompts or ()
        if not controls and not prompts:
            return None
        return Steering(controls, prompts, self.residence, self.precision.unet, engine)
