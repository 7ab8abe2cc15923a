"""A model as a call meets it: its networks, which threads may use them, and what prompts mean to it."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from latentdiff.diffusion.schedule import Schedule
from latentdiff.errors import UsageError
from latentdiff.model.adapted import AdaptedModel
from latentdiff.model.memory.sharing import Sharing, one_use
from latentdiff.networks.device import apart_from_torch, describe_device
from latentdiff.networks.inputs import INPAINTING, NEEDS, TEXT, VARIATIONS
from latentdiff.networks.kernels import forms_in_use
from latentdiff.networks.sizes import SizeOptions, Told
from latentdiff.networks.steering import Network
from latentdiff.networks.text_embedding import PLAIN, EncodedPrompt, PromptEncoder, Reading
from latentdiff.networks.unet import UNet
from latentdiff.networks.vae import VAE, LatentDecoder
from latentdiff.prompts.syntax import read_prompt
from latentdiff.recipe import Recipe, library_versions
from latentdiff.request.plan import Plan, Sampling

if TYPE_CHECKING:
    from latentdiff.adapters.control.applied import Steering
    from latentdiff.networks.regional import Regions
    from latentdiff.networks.text_encoder import TextEncoder
    from latentdiff.networks.text_encoders import TextEncoders
    from latentdiff.prompts.account import PromptAccount


class PromptedModel(AdaptedModel):
    """Text encoder, U-Net and VAE, each read from its file when it is first asked for, and what reads prompts.

    Threads draw at the same time on a resident model in float32; in all other modes one call waits for the other. What
    changes the model (`load_lora`, `to`, ...) waits for drawings and is waited for by them. So each image is the one
    that is made without other threads.
    """

    name: str
    model_hash: str
    ema: bool
    elsewhere: dict[str, dict[str, str]]
    schedule: Schedule
    sharing: Sharing
    backend: Any
    inputs: str  # what the U-Net sees besides latents and text; see `networks.inputs`
    told_count: int  # how many sizes it is told beside the text
    _network: Network | None = None  # what an engine made of the U-Net
    _decoder: LatentDecoder | None = None

    @property
    def text_encoder(self) -> TextEncoder | TextEncoders:
        """Token ids (N, L) -> embeddings (N, L, C); of SDXL with pooled text in a row more."""
        return self.residence.ready("text_encoder")

    @property
    def unet(self) -> UNet:
        """Noisy latents, timestep and text -> raw prediction."""
        return self.residence.ready("unet")

    @property
    def vae(self) -> VAE:
        """Images to latents and back."""
        return self.residence.ready("vae")

    @property
    def network(self) -> Network:
        """What computes the U-Net: itself, or what an engine made of it; see `latentdiff.engines`."""
        return self._network or self.unet

    @network.setter
    def network(self, network: Network) -> None:
        self._network = None if network is self.residence.module("unet") else network

    @property
    def decoder(self) -> LatentDecoder:
        """What computes `vae.decode`."""
        return self._decoder or self.vae.decode

    @decoder.setter
    def decoder(self, decoder: LatentDecoder) -> None:
        self._decoder = None if decoder == self.residence.module("vae").decode else decoder

    def changes_in_use(self) -> bool:
        """Whether drawing puts something on the modules: an engine's forms, the guidance scale that a U-Net is told, or
        what the residence does."""
        has_engine = self._network is not None or self._decoder is not None
        is_told = self.residence.module("unet").config.time_cond_proj_dim is not None
        return has_engine or is_told or self.residence.changes_in_use

    @property
    def default_size(self) -> tuple[int, int]:
        """Height and width in pixels of the images that the model was trained on."""
        side = self.residence.module("unet").config.sample_size * self.residence.module("vae").config.downscale
        return side, side

    def told(self, height: int, width: int, options: SizeOptions = SizeOptions()) -> Told | None:  # noqa: B008
        """What the U-Net is told beside the text of an image of this size in pixels; None if it is told nothing.

        Raises:
            UsageError: something else than the defaults is to be told to one that is told nothing.
        """
        if self.told_count:
            return options.told(self.told_count, height, width)
        if options != SizeOptions():
            raise UsageError("this model is not told sizes, crops or scores, which those of SDXL are; leave them out")
        return None

    @property
    def device(self) -> torch.device:
        """Where the model lies and latents are made."""
        return self.residence.device

    @property
    def is_for_inpainting(self) -> bool:
        """Whether the U-Net sees, after the latents, a mask and the latents of the image under it."""
        return self.inputs == INPAINTING

    @contextmanager
    def in_use(self, *, alone: bool = False) -> Generator[None, None, None]:
        """Inside, no other thread changes the model; with `alone`, no other one uses it either. It may be nested.

        Raises:
            UsageError: this process was forked from the one that loaded the model, and has not what it needs.
        """
        if self.sharing.is_forked:
            self._check_fork()
        with self.sharing.entered(alone=alone), apart_from_torch(self.residence.device.type):
            yield

    @contextmanager
    def alone(self) -> Generator[None, None, None]:
        """Keep the model to this thread for several calls: `load_lora`, draw, `unload_lora`, say, which other threads
        then never see. Prompts that name LoRAs (`offer_loras`) need it not.
        """
        with self.in_use(alone=True):
            yield

    def _check_fork(self) -> None:
        threads = torch.get_num_threads()
        reasons = {
            "another thread was changing the model then": self.sharing.is_spoilt,
            "a model on a GPU does not come along": self.residence.device.type != "cpu",
            "the thread that streams its weights did not come along": self.residence.low_memory,
            f"the threads of the back end {self.backend} did not come along": self.backend != "torch",
            f"torch's {threads} threads did not come along; call torch.set_num_threads(1)": threads > 1,
        }
        if found := next((reason for reason, holds in reasons.items() if holds), None):
            raise UsageError(
                f"this process was forked from the one that loaded the model, and {found}; or load the model here, or "
                "start the process by spawn"
            )

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
        from latentdiff.networks.regional import Regions

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
        from latentdiff.prompts.account import account

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
        from latentdiff.networks.seamless import seamless

        return seamless(plan.around, (self.residence.module("vae"),))

    def latents_going_around(self, plan: Plan, axes: str) -> AbstractContextManager[None]:
        """Inside, the U-Net and what steers it see them continue along those of `axes` that do."""
        along = "".join(axis for axis in plan.around if axis in axes)
        if not along:
            return nullcontext()
        from latentdiff.adapters.control.applied import control_parts
        from latentdiff.networks.seamless import seamless

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
        from latentdiff.networks.told_guidance import told_guidance

        return told_guidance(self.unet, scale)

    def factored(self, factors: Sequence[float] | None) -> AbstractContextManager[None]:
        """See `freeu`; of the U-Net."""
        if factors is None:
            return nullcontext()
        from latentdiff.networks.freeu import freeu

        return freeu(self.unet, factors)

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
        from latentdiff.adapters.control.applied import Steering

        return Steering(controls, prompts, self.residence, self.precision.unet, engine)
