"""What the methods of fine-tuning train of a model, and the file or folder that each leaves behind."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from latentdiff.adapters.control.applied import check_fits, network_for
from latentdiff.adapters.lora.adapter import LoRA
from latentdiff.adapters.lora.metadata import lora_metadata, network_metadata
from latentdiff.adapters.lora.norms import limit_norms
from latentdiff.adapters.lora.saving import save_lora
from latentdiff.adapters.lora.spec import LoRASpec, by_block
from latentdiff.adapters.textual_inversion import NewWord
from latentdiff.checkpoints.components import Components, save_folder
from latentdiff.checkpoints.control import read_control
from latentdiff.checkpoints.control_layouts import write_control_folder
from latentdiff.errors import UsageError
from latentdiff.networks.controlnet import ControlNetwork, control_config
from latentdiff.networks.text_encoders import unused_by
from latentdiff.training.data.randomness import torch_seed
from latentdiff.training.denoising import text_and_unet
from latentdiff.training.dropout import Dropout
from latentdiff.training.ema import EMA
from latentdiff.training.finetuning.adapter_options import assignments
from latentdiff.training.finetuning.config import FinetuneConfig
from latentdiff.training.optimizer import ParameterGroup
from latentdiff.training.preferences import AsBefore

TYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

PARTS = ("unet", "text_encoder", "vae")


class FinetuningMethod(ABC):
    """One way to fine-tune the parts of a model.

    Args:
        parts: the model, loaded; its networks are set up for training here.
        settings: how.
    """

    adapter: nn.Module | None = None
    """What is trained beside the model's own weights."""

    control: ControlNetwork | None = None
    """The ControlNet that is trained beside the U-Net."""

    dropout: Dropout | None = None
    """What the adapter leaves out in training."""

    trains_text: bool = False
    """Whether the embeddings of captions change during training."""

    changes_model: bool = True
    """Whether the model itself predicts otherwise in the end; it does not where only a new word or a hint is learned."""

    def __init__(self, parts: Components, settings: FinetuneConfig) -> None:
        self.parts, self.settings = parts, settings
        self.file_types = {part: next(getattr(parts, part).parameters()).dtype for part in PARTS}
        for part in PARTS:
            frozen = TYPES[settings.base_precision] if part != "vae" else torch.float32  # SD's VAE overflows float16
            getattr(parts, part).requires_grad_(False).to(frozen)

    def attached(self) -> AbstractContextManager[Any]:
        """Inside, the networks compute with the adapter."""
        return nullcontext()

    def as_before(self) -> AsBefore:
        """Made before anything was trained: a context inside which the networks compute as they do now."""
        raise NotImplementedError  # `loss: dpo` alone asks, and goes with the methods that have it

    def networks(self) -> list[nn.Module]:
        """Networks of which everything is trained."""
        return []

    def after_step(self) -> None:  # noqa: B027 (optional)
        """What is done with the weights when the optimizer has taken a step."""

    @abstractmethod
    def parameter_groups(self) -> list[ParameterGroup]:
        """What is trained."""

    @abstractmethod
    def save(self, run: Path, facts: Mapping[str, Any]) -> Path:
        """Write the result into the run folder; returns its path.

        Args:
            facts: about the training, for the files' metadata.
        """

    def _groups(self, by_part: dict[str, dict[str, nn.Parameter]]) -> list[ParameterGroup]:
        return text_and_unet(by_part, self.settings.lr, self.settings.text_encoder_lr)


class FullMethod(FinetuningMethod):
    """All weights of the U-Net, and of the text encoder if asked for, in float32."""

    def __init__(self, parts: Components, settings: FinetuneConfig) -> None:
        super().__init__(parts, settings)
        self.trains_text = bool(settings.train_text_encoder)
        self._trained = ("unet", "text_encoder") if self.trains_text else ("unet",)
        for part in self._trained:
            getattr(parts, part).float().requires_grad_(True)
        for name, parameter in parts.text_encoder.named_parameters() if self.trains_text else ():
            parameter.requires_grad_(not name.startswith(unused_by(parts.text_encoder)))

    def networks(self) -> list[nn.Module]:
        return [getattr(self.parts, part) for part in self._trained]

    def as_before(self) -> AsBefore:
        of = {name: p for group in self.parameter_groups() for name, p in group.parameters.items()}
        return EMA(of, decay=1.0).swapped_in  # never updated: the weights as they are now

    def parameter_groups(self) -> list[ParameterGroup]:
        return self._groups(
            {
                part: {
                    f"{part}.{name}": p for name, p in getattr(self.parts, part).named_parameters() if p.requires_grad
                }
                for part in self._trained
            }
        )

    def save(self, run: Path, facts: Mapping[str, Any]) -> Path:
        wanted = TYPES.get(self.settings.result_precision)
        for part, own in self.file_types.items():
            getattr(self.parts, part).to(wanted or own)
        words = self.parts.words and self.parts.words.with_texts(facts.get("words", ()))
        save_folder(replace(self.parts, words=words), run / "model")
        return run / "model"


class LoRAMethod(FinetuningMethod):
    """Low-rank matrices beside the weights (Hu et al. 2021), or another kind of adapter."""

    def __init__(self, parts: Components, settings: FinetuneConfig) -> None:
        super().__init__(parts, settings)
        self.adapter = self.lora = LoRA.create(parts.unet, parts.text_encoder, _spec(settings), settings.seed)
        self.trains_text = any(not name.startswith("unet.") for name in self.lora.layers)
        shares = {"inputs": settings.dropout, "ranks": settings.rank_dropout, "layers": settings.module_dropout}
        self.dropout = Dropout(settings.seed, **shares) if any(shares.values()) else None
        block_lr = {block: float(rate) for block, rate in assignments(settings.block_lr).items()}
        self._block_lr = by_block(block_lr, list(self.lora.layers), 0.0, "block_lr")  # 0 where nothing is said

    def attached(self) -> AbstractContextManager[Any]:
        return self.lora.attached(part=self.dropout and self.dropout.added)

    def as_before(self) -> AsBefore:
        return self.lora.switched_off

    def parameter_groups(self) -> list[ParameterGroup]:
        by_part: dict[str, dict[str, nn.Parameter]] = {"unet": {}, "text_encoder": {}}
        for layer_name, layer in self.lora.layers.items():
            part = "unet" if layer_name.startswith("unet.") else "text_encoder"
            by_part[part] |= {f"{layer_name}.{name}": parameter for name, parameter in layer.named_parameters()}
        groups, orthogonal = (
            self._groups(by_part),
            self.settings.adapter != "oft",
        )  # its blocks are no matrices that act
        return [replace(g, rates=self._factors(g), muon=g.muon and orthogonal) for g in groups]

    def _factors(self, group: ParameterGroup) -> dict[str, float]:
        """Factors on the learning rate of the group: of blocks, and of the second matrices by LoRA+."""
        usual, plus = self.settings.lr * group.lr_scale, self.settings.loraplus or 1.0
        return {
            f"{layer}.{name}": (rate / usual if rate else 1.0) * (plus if name.endswith("lora_up.weight") else 1.0)
            for layer, rate in self._block_lr.items()
            for name, _ in self.lora.layers[layer].named_parameters()
        }

    def after_step(self) -> None:
        if (largest := self.settings.max_norm) is not None:
            limit_norms(self.lora.layers.values(), largest)

    def save(self, run: Path, facts: Mapping[str, Any]) -> Path:
        parts, path = self.parts, run / "lora.safetensors"
        metadata = lora_metadata(
            parts.unet.config,
            parts.schedule_config.prediction_type,
            model=parts.name,
            model_hash=parts.hash,
            title=run.resolve().name,
            training=facts,
        )
        if (wanted := TYPES.get(self.settings.result_precision)) is not None:
            self.lora.keep_in(wanted)
        save_lora(self.lora, path, metadata | network_metadata(_spec(self.settings)))
        return path


def _spec(settings: FinetuneConfig) -> LoRASpec:
    return LoRASpec(
        rank=settings.rank,
        alpha=settings.alpha,
        targets=settings.targets,
        kind=settings.adapter,
        block_rank={block: int(rank) for block, rank in assignments(settings.block_rank).items()},
        rank_stabilized=settings.rslora,
        axis=("outputs", "inputs").index(settings.dora_lengths),
        factor=settings.lokr_factor,
    )


class TextualInversionMethod(FinetuningMethod):
    """The embedding of one new word (Gal et al. 2022); the model stays as it is."""

    trains_text = True
    changes_model = False

    def __init__(self, parts: Components, settings: FinetuneConfig) -> None:
        super().__init__(parts, settings)
        assert settings.word is not None
        self.adapter = self.word = NewWord.create(
            settings.word, parts.tokenizer, parts.text_encoder, settings.initial_word
        )
        parts.tokenizer = self.word.extended(parts.tokenizer)

    def attached(self) -> AbstractContextManager[Any]:
        return self.word.attached(self.parts.tokenizer, self.parts.text_encoder)

    def parameter_groups(self) -> list[ParameterGroup]:
        return [ParameterGroup("word", dict(self.word.named_parameters()), muon=False)]  # rows of a table, no matrix

    def save(self, run: Path, facts: Mapping[str, Any]) -> Path:
        path = run / "embedding.safetensors"
        self.word.save(path, {"model": self.parts.name, "model_hash": self.parts.hash, "training": json.dumps(facts)})
        return path


class ControlNetMethod(FinetuningMethod):
    """A ControlNet beside the model, which stays as it is (Zhang et al. 2023)."""

    changes_model = False

    def __init__(self, parts: Components, settings: FinetuneConfig) -> None:
        super().__init__(parts, settings)
        unet, factor = parts.unet, parts.vae.config.downscale
        if settings.control_model is None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(torch_seed(settings.seed, "controlnet"))
                self.control = ControlNetwork(control_config(unet.config, factor))
                self.control.start_from(unet)
        else:
            weights = read_control(settings.control_model)
            if weights.config.modes:
                raise UsageError(
                    f"{weights.path.name} is a ControlNet for several kinds of hints, which cannot be trained here; take one"
                    " for a single kind"
                )
            check_fits(weights, unet.config, factor)
            self.control = network_for(weights, unet)
        self.control.float().requires_grad_(True)

    def parameter_groups(self) -> list[ParameterGroup]:
        assert self.control is not None
        return [ParameterGroup("all", {f"controlnet.{name}": p for name, p in self.control.named_parameters()})]

    def save(self, run: Path, facts: Mapping[str, Any]) -> Path:
        assert self.control is not None
        settings, parts = self.settings, self.parts
        self.control.to(TYPES.get(settings.result_precision) or self.file_types["unet"])
        about = {"model": parts.name, "model_hash": parts.hash, "hints": settings.control_kind or "given"}
        about["training"] = json.dumps(facts)
        config = self.control.control.to_diffusers()
        write_control_folder(self.control.state_dict(), config, run / "controlnet", about)
        return run / "controlnet"


def make_method(parts: Components, settings: FinetuneConfig) -> FinetuningMethod:
    """The method that `settings` names, applied to a model."""
    methods: dict[str, type[FinetuningMethod]] = {
        "full": FullMethod,
        "lora": LoRAMethod,
        "textual_inversion": TextualInversionMethod,
        "controlnet": ControlNetMethod,
    }
    return methods[settings.method](parts, settings)
