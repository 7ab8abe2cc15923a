"""A model in memory: its parts, where they lie and how precisely they compute, and what adapts them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Self, get_args

import torch
from torch import Tensor

from latentdiff.adapters.lora.loaded import LoadedLoRAs
from latentdiff.adapters.lora.offered import OfferedLoRAs
from latentdiff.adapters.lora.strength import Strength
from latentdiff.adapters.textual_inversion import LoadedEmbeddings
from latentdiff.checkpoints.distilled import Distilled
from latentdiff.checkpoints.embedded import EMBEDDED_NAME, embedded_model
from latentdiff.checkpoints.parts import check_fit, described
from latentdiff.diffusion.config import ScheduleConfig
from latentdiff.diffusion.schedule import Schedule
from latentdiff.engines.backends import engines_for
from latentdiff.engines.fast_forms import use_fast_forms
from latentdiff.errors import UsageError
from latentdiff.model.memory.residence import Residence
from latentdiff.model.memory.sharing import Sharing, one_use
from latentdiff.model.portable import PortableModel, absolute
from latentdiff.model.prompted import PromptedModel
from latentdiff.networks.device import Precision, apart_from_torch, pick_device, pick_precision, precision_of
from latentdiff.networks.inputs import GUIDANCE, INPAINTING, TEXT, inputs_of
from latentdiff.networks.sizes import count_of_sizes
from latentdiff.networks.unet import UNet
from latentdiff.networks.vae import VAE
from latentdiff.request.calls import public
from latentdiff.request.domains import Choice, Place, YesNo
from latentdiff.request.options import BackendName, PrecisionName, PredictionName

if TYPE_CHECKING:
    from latentdiff.checkpoints.components import Components
    from latentdiff.checkpoints.unclip import SeenImages
    from latentdiff.engines import Example
    from latentdiff.networks.text_encoder import TextEncoder
    from latentdiff.networks.text_encoders import TextEncoders
    from latentdiff.prompts.words import Words


class LoadedModel(PromptedModel, PortableModel):
    """Tokenizer, text encoder, U-Net, VAE and noise schedule, each usable alone.

    Args:
        tokenizer: a `Tokenizer`, or one of transformers.
        text_encoder: token ids (N, L) -> embeddings (N, L, C); or the `TextEncoders` of SDXL.
        name, model_hash, ema: what recipes say about the model.
        words: what a small model says that it knows.
        stored: the weights of parts that are on the meta device, see `Residence`; they are read at their first use.
        augmentation: the schedule of the noise that is put on what the U-Net sees beside its latents, and that it is told of
            (conditioning augmentation, Ho et al. 2022, section 4.3).
        images: how an unCLIP model sees images.
        low_memory: see `load`.
        distilled: the LoRA with which it draws in few steps, if it has one.

    Attributes:
        residence: which of the networks are in memory; `residence.keep` says how long they stay there.
        elsewhere: what recipes say of the parts that do not come from the model; see `Recipe.parts`.
        sharing: which threads use it.

    Raises:
        CheckpointError: the parts do not fit one another.
    """

    def __init__(
        self,
        tokenizer: Any,
        text_encoder: TextEncoder | TextEncoders,
        unet: UNet,
        vae: VAE,
        schedule_config: ScheduleConfig,
        *,
        name: str = "",
        model_hash: str = "",
        ema: bool = False,
        stored: Mapping[str, Mapping[str, Tensor]] | None = None,
        augmentation: ScheduleConfig | None = None,
        images: SeenImages | None = None,
        low_memory: bool = False,
        words: Words | None = None,
        distilled: Distilled | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        parts = {"text_encoder": text_encoder, "unet": unet, "vae": vae}
        self.sharing = Sharing(self.changes_in_use)
        self.residence = Residence(parts, stored or {}, low_memory=low_memory, may_give_back=self.sharing.claim)
        is_told = unet.config.time_cond_proj_dim is not None
        few_steps = distilled.options if distilled else None
        drawing = replace(schedule_config.drawing, tells_guidance=is_told, few_steps=few_steps)
        self.inputs = inputs_of(unet.config, vae.config.latent_channels)
        drawing = replace(drawing, guidance_scale=drawing.guidance_scale or GUIDANCE.get(self.inputs))
        self.schedule = Schedule(schedule_config.with_drawing(drawing))
        self.images = images
        self.augmentation = Schedule(augmentation) if augmentation else None
        self.name, self.model_hash, self.ema, self.words = name, model_hash, ema, words
        self.precision = precision_of(unet)
        self.backend: BackendName = "torch"
        self.loras = LoadedLoRAs(unet, text_encoder)
        self.embeddings = LoadedEmbeddings(tokenizer, text_encoder)
        self.offered, self.adapted_by, self.loaded_from = OfferedLoRAs(), [], None
        self.distilled, self._student = distilled, None
        self.elsewhere: dict[str, dict[str, str]] = {}
        check_fit("text embeddings", text_encoder.embedding_width, unet.config.cross_attention_dim)
        self.told_count = count_of_sizes(unet.config, getattr(text_encoder, "pooled_width", None))
        check_fit("latent channels", vae.config.latent_channels, unet.config.out_channels)

    @classmethod
    @public(
        source=Place(),
        precision=Choice(get_args(PrecisionName)),
        ema=YesNo(),
        prediction_type=Choice(get_args(PredictionName)),
        backend=Choice(get_args(BackendName)),
        low_memory=YesNo(),
        zero_terminal_snr=YesNo(),
        vae=Place(),
        text_encoder=Place(),
        base=Place(),
    )
    @apart_from_torch()
    @torch.inference_mode(False)  # what is made inside could not be used outside
    def load(
        cls,
        source: str | os.PathLike[str] | None = None,
        *,
        device: str | torch.device = "auto",
        precision: PrecisionName = "auto",
        backend: BackendName = "torch",
        low_memory: bool = False,
        ema: bool = False,
        prediction_type: PredictionName | None = None,
        zero_terminal_snr: bool = False,
        vae: str | os.PathLike[str] | None = None,
        text_encoder: str | os.PathLike[str] | None = None,
        base: str | os.PathLike[str] | None = None,
    ) -> Self:
        """Load a model. Each part's weights are read when it is first used.

        Args:
            source: a folder in the diffusers layout, a hub id, or a single file; None is the embedded model.
            device: "auto", "cpu", "cuda", "cuda:N" or "mps"; see `pick_device`.
            precision: "auto", "fp32", "bf16", "fp16" or "int8"; see `pick_precision`.
            backend: "torch", "openvino" or "compile"; see `use_backend`.
            low_memory: keep only the part that is used, of the U-Net only two blocks at a time, and decode images
                that are larger than those of the training in tiles. Slower; the image is otherwise the same.
            ema: take the averaged weights of a `.ckpt` that holds both.
            prediction_type: what the U-Net predicts, "epsilon", "v_prediction" or "sample", where the model
                does not say or says it wrong.
            zero_terminal_snr: begin in pure noise, where the model was trained so and does not say it.
            vae: where another VAE lies, to be taken in place of the model's own; it may be a TAESD.
            text_encoder: where another text encoder lies, likewise.
            base: a model that the parts come from that the file lacks.

        Raises:
            CheckpointError: there is no model there, or it is damaged or of another kind.
            UsageError: there is no such option, a value outside its domain, or no such device here.
        """
        from latentdiff.checkpoints.components import load_components

        where = pick_device(device)
        place = embedded_model() if source is None else source
        found = load_components(
            place,
            weights=False,
            ema=ema,
            prediction_type=prediction_type,
            zero_terminal_snr=zero_terminal_snr,
            vae=vae,
            text_encoder=text_encoder,
            base=base,
        )
        if source is None:
            found.name = EMBEDDED_NAME
        pipe = cls.from_components(found, ema=ema, low_memory=low_memory)
        pipe.elsewhere = described(vae=vae, text_encoder=text_encoder, base=base)
        pipe.loaded_from = {
            "source": absolute(source),
            "low_memory": low_memory,
            "ema": ema,
            "prediction_type": prediction_type,
            "zero_terminal_snr": zero_terminal_snr,
            "vae": absolute(vae),
            "text_encoder": absolute(text_encoder),
            "base": absolute(base),
        }
        pipe._place(where, precision)  # `to` would try the precision with the back end "torch", which may lack it
        return pipe.use_backend(backend)

    @classmethod
    def from_components(cls, parts: Components, *, ema: bool = False, low_memory: bool = False) -> Self:
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
            augmentation=parts.augmentation,
            images=parts.images,
            low_memory=low_memory,
            words=parts.words,
            distilled=parts.distilled,
        )

    @public(folder=Place())
    @one_use()
    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the model as a folder in the diffusers layout, in the precision that it has here, without its LoRAs."""
        from latentdiff.checkpoints.components import Components, save_folder

        self.residence.require_whole("saving")
        parts = Components(
            self.tokenizer,
            self.text_encoder,
            self.unet,
            self.vae,
            self.schedule.config,
            self.name,
            self.model_hash,
            words=self.words,
            distilled=self.distilled,
            augmentation=self.augmentation and self.augmentation.config,
            images=self.images,
        )
        save_folder(parts, os.path.abspath(folder))

    @public()
    @one_use(alone=True)
    @torch.inference_mode(False)
    def to(self, device: torch.device | str, precision: Precision | PrecisionName | None = None) -> Self:
        """Move the model to `device`, and to `precision` if one is given; see `pick_device` and `pick_precision`.

        On a CPU the modules get their fast forms, see `latentdiff.engines.fast_forms`.

        Raises:
            UsageError: there is no such precision, or this machine has no such device; nothing has moved then.
        """
        self._place(pick_device(device), precision)
        return self.use_backend(self.backend)

    def _place(self, where: torch.device, precision: Precision | PrecisionName | None) -> None:
        if isinstance(precision, str):
            size = sum(parameter.numel() for parameter in self.residence.module("unet").parameters())
            precision = pick_precision(precision, where, size)
        self.precision = precision or self.precision
        self.residence.to(where, self.precision)
        if self.device.type == "cpu":
            for name in ("text_encoder", "unet", "vae"):
                use_fast_forms(self.residence.module(name))
        self.loras.to(where, self.precision)
        self.embeddings.to(where)

    @one_use(alone=True)
    def use_backend(self, name: BackendName) -> Self:
        """Compute the U-Net and the decoder by the back end `name` from now on; the modules stay as they are.

        "torch" is the modules themselves. "openvino" and "compile" translate them at the first image of each size;
        the first is for CPUs, the second mostly for GPUs. Their images are those of the modules up to rounding. Where
        a LoRA or another tap is on a module, or gradients are needed, they leave it to the modules or say that they
        cannot.

        With the precision "int8", "openvino" first makes a few images and fits its numbers to what the U-Net sees
        there. For Stable Diffusion that takes minutes and much memory, once: the result is kept in the cache folder.

        Raises:
            UsageError: there is no such back end, or it cannot compute this model here.
            MissingDependencyError: what it needs is not installed.
        """
        if name != "torch" or self.precision.name == "int8":
            self.residence.require_whole(f"the back end {name} in {self.precision.name}")
        unet, vae = self.residence.module("unet"), self.residence.module("vae")
        self.network, self.decoder = engines_for(name, self.precision.name, unet, vae, self._examples)
        self.backend = name
        return self

    def _examples(self) -> list[Example]:
        from latentdiff.engines.calibration import calibration_examples

        if self.inputs not in (TEXT, INPAINTING):
            raise UsageError(
                "int8 by openvino fits its numbers to images made of prompts, and this model needs more than a prompt; "
                "expected another precision, or the back end torch"
            )
        channels, sizes = self.vae.config.latent_channels, self.told(*self.default_size)
        return calibration_examples(self.tokenizer, self.text_encoder, self.unet, self.schedule, channels, sizes)

    def __repr__(self) -> str:
        """What is loaded: model, size, precision, device, and what adapts it."""
        height, width = self.default_size
        parameters = sum(parameter.numel() for parameter in self.residence.module("unet").parameters())
        facts = [
            self.name or "unnamed model",
            f"U-Net of {parameters / 1e6:.1f} million parameters"
            + (f" for {self.inputs}" if self.inputs != TEXT else ""),
            f"trained at {width}x{height}",
            f"{self.schedule.config.prediction_type} prediction",
            f"{self.precision.name} on {self.device}",
            *([f"back end {self.backend}"] if self.backend != "torch" else []),
            *(["low memory"] if self.residence.low_memory else []),
            *([f"fast in {self.distilled.options['steps']} steps"] if self.distilled else []),
            *(f"{entry['file']} x {Strength.of(entry['scale'])}" for entry in self.adaptations() if "scale" in entry),
        ]
        return f"<{type(self).__name__} {', '.join(facts)}>"
