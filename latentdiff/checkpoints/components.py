"""Models on disk: loading them in whichever layout they lie, and saving them."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latentdiff.checkpoints.conversion import Choices, read_model
from latentdiff.checkpoints.distilled import Distilled
from latentdiff.checkpoints.families import family_with
from latentdiff.checkpoints.folder import write_folder
from latentdiff.checkpoints.habits import take_habit, with_habit
from latentdiff.checkpoints.hashing import model_hash
from latentdiff.checkpoints.index import augmentations, model_index
from latentdiff.checkpoints.mapping import fill
from latentdiff.checkpoints.modules import module_without_weights, parse_config
from latentdiff.checkpoints.raw import RawModel
from latentdiff.checkpoints.text_parts import second_tokenizer, text_module
from latentdiff.checkpoints.tokenizer import tokenizer_files
from latentdiff.diffusion.config import ScheduleConfig
from latentdiff.errors import ConfigError
from latentdiff.networks.text_encoders import TextEncoders, encoders_of
from latentdiff.reading.plain import exists

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from latentdiff.checkpoints.unclip import SeenImages
    from latentdiff.networks.text_encoder import TextEncoder
    from latentdiff.networks.unet import UNet
    from latentdiff.networks.vae import VAE
    from latentdiff.prompts.tokenizer import Tokenizer
    from latentdiff.prompts.words import Words


@dataclass
class Components:
    """The parts of a model, each usable alone, and what recipes call it."""

    tokenizer: Tokenizer
    text_encoder: TextEncoder | TextEncoders
    unet: UNet
    vae: VAE
    schedule_config: ScheduleConfig
    name: str = ""
    hash: str = ""  # 64 hex digits; the first ten are what web UIs show
    stored: dict[str, dict[str, Tensor]] = field(default_factory=dict)  # see `load_components`
    words: Words | None = None  # what a small model says that it knows
    distilled: Distilled | None = None  # what it draws with in few steps
    augmentation: ScheduleConfig | None = None  # of the noise on what the U-Net sees, of models that are told how much
    images: SeenImages | None = None  # how an unCLIP model sees them


def load_components(
    source: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    weights: bool = True,
    **choices: Any,
) -> Components:
    """Load a model from a diffusers folder, a hub id, or an original single file (`.safetensors`, `.ckpt`).

    Tensors of safetensors files are mapped, not copied, and keep their types unless `dtype` is given.

    Args:
        source: where it is. A hub id is looked up in the local cache first.
        dtype: of all weights; None keeps those of the file. What has to be converted is, tensor by tensor: no more than
            one of them is in memory in both types.
        weights: False leaves the parts on the meta device, with the mapped tensors in `Components.stored` by part and
            name: they fit, and nothing of them has been read.
        choices: averaged weights, prediction type, parts from elsewhere: the fields of `Choices`.

    Raises:
        CheckpointError: nothing is there, or it is damaged, incomplete, or of another kind.
        ConfigError: the configuration describes another architecture.
    """
    raw = read_model(source, Choices(**choices))
    name = _name(source, raw)
    habit = take_habit(raw, name, prediction_type=choices.get("prediction_type"))
    schedule_config = parse_config("scheduler", raw.configs["scheduler"])
    if habit is not None:
        schedule_config = with_habit(schedule_config, habit, name)
    for warning in (*raw.warnings, *schedule_config.drawing.notes):
        warnings.warn(warning, stacklevel=2)
    modules: dict[str, Any] = {}
    stored: dict[str, dict[str, Tensor]] = {}
    modules["text_encoder"], stored["text_encoder"], tokenizer = text_module(raw, dtype)
    for part in ("unet", "vae"):
        modules[part], stored[part] = module_without_weights(raw, part, dtype)
    if weights:
        for part, module in modules.items():
            fill(module, stored.pop(part))
    usual = augmentations(modules["unet"].config)
    noised = [parse_config(part, raw.configs.get(part, config)) for part, config in usual.items()]
    images = None
    if width := modules["unet"].config.class_dim:
        from latentdiff.checkpoints.unclip import seen_images

        images = seen_images(raw, width)
    return Components(
        tokenizer=tokenizer,
        **modules,
        augmentation=noised[0] if noised else None,
        images=images,
        stored=stored,
        schedule_config=schedule_config,
        name=name,
        hash=model_hash(raw.weight_files),
        words=raw.words,
        distilled=raw.distilled,
    )


def _name(source: str | os.PathLike[str], raw: RawModel) -> str:
    """What people call the model: a file's name without suffix, a folder's name, or the hub id."""
    path = raw.source.resolve()
    if not exists(Path(os.path.expanduser(source))):
        return os.fspath(source)
    return path.name if path.is_dir() else path.stem


def save_folder(components: Components, folder: str | os.PathLike[str]) -> None:
    """Write a model in the diffusers folder layout, in the types that its weights have; it opens in diffusers.

    The folder is built beside its place and renamed to it: it is there whole, or not at all. An existing one
    is replaced only if it holds nothing but a model.

    Raises:
        CheckpointError: `folder` holds something else.
        ConfigError: the text encoder is not one that the layout can hold.
    """
    from latentdiff.checkpoints.unclip import beside_of

    texts = encoders_of(components.text_encoder)
    if not all(hasattr(encoder, "config") for encoder in texts.values()):
        raise ConfigError(
            f"the diffusers layout holds CLIP text encoders under transformers' names, found a "
            f"{type(components.text_encoder).__name__}; save its parts by hand"
        )
    unet_config = components.unet.config.to_diffusers()
    scheduler = components.schedule_config.to_diffusers()
    parts = {"unet": components.unet, "vae": components.vae, **texts}
    vae_config = components.vae.config.to_diffusers()
    index = model_index(components.unet.config, vae_config["_class_name"], scheduler["_class_name"], family_with(parts))
    files, second = tokenizer_files(components.tokenizer), dict[str, str]()
    if isinstance(components.text_encoder, TextEncoders):
        index["force_zeros_for_empty_prompt"] = components.text_encoder.zero_empty
        second = getattr(components.tokenizer, "second", {}) or second_tokenizer(
            files, components.text_encoder, components.tokenizer
        )
    beside, seeing = beside_of(components.images) if components.images else ({}, {})
    raw = RawModel(
        source=Path(folder),
        tensors={part: dict(module.state_dict()) for part, module in parts.items()},
        configs={
            "unet": unet_config,
            "vae": vae_config,
            **{part: dict(encoder.config) for part, encoder in texts.items()},
            "scheduler": scheduler,
            **_augmentation(components),
            **seeing,
            "model_index": index,
        },
        tokenizer=files,
        second_tokenizer=second,
        words=components.words,
        distilled=components.distilled,
        beside=beside,
    )
    write_folder(raw, Path(folder))


def _augmentation(components: Components) -> dict[str, dict[str, Any]]:
    found = components.augmentation
    usual = augmentations(components.unet.config)
    return usual if found is None else {part: {**config, **found.to_diffusers()} for part, config in usual.items()}
