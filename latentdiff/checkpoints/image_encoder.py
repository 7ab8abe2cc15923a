"""The folder of a CLIP image encoder: `config.json` and the weights, as transformers writes CLIPVisionModelWithProjection."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from latentdiff.checkpoints.files import read_tensors
from latentdiff.checkpoints.folder import listing
from latentdiff.checkpoints.keymap import check_floats, compare
from latentdiff.checkpoints.modules import NoInitialization, sensible, shapes_of
from latentdiff.errors import CheckpointError
from latentdiff.networks.image_encoder import ImageEncoder, ImageEncoderConfig
from latentdiff.reading.json import read_object
from latentdiff.reading.plain import exists

LABEL = "image encoder"
CONFIG = "config.json"
_FILES = ("model.safetensors", "pytorch_model.bin", "model.fp16.safetensors", "pytorch_model.fp16.bin")
_BODY, _HEAD = "vision_model.", "visual_projection."
_POSITIONS = f"{_BODY}embeddings.position_ids"  # a table of 0, 1, 2, ...
_MODEL_TYPES = ("clip_vision_model", "clip")
_FOLDER = "image_encoder"


@dataclass(frozen=True, eq=False)
class ImageEncoderWeights:
    """The weights of an image encoder, mapped, and its configuration."""

    path: Path
    tensors: dict[str, Tensor]
    config: ImageEncoderConfig


def read_image_encoder(folder: str | os.PathLike[str]) -> ImageEncoderWeights:
    """Read an image encoder.

    Raises:
        CheckpointError: it is no such folder, damaged or incomplete.
        ConfigError: the configuration describes another architecture.
    """
    path = Path(os.path.expanduser(os.fspath(folder)))
    config = read_image_encoder_config(path)
    file = next((path / name for name in _FILES if exists(path / name)), None)
    if file is None:
        raise CheckpointError(f"expected the weights of an {LABEL}, {_FILES[0]} say, in {path}, found {listing(path)}")
    tensors = {
        name if name.startswith((_BODY, _HEAD, "text_model.")) else f"{_BODY}{name}": tensor
        for name, tensor in read_tensors(file).tensors.items()
    }
    tensors.pop(_POSITIONS, None)
    compare(LABEL, shapes_of(empty_image_encoder(config).state_dict()), shapes_of(tensors)).raise_unless_fits(path)
    check_floats(LABEL, path, tensors)
    return ImageEncoderWeights(path, tensors, config)


def read_image_encoder_config(path: Path) -> ImageEncoderConfig:
    """The configuration of an image encoder, without its weights.

    Raises:
        CheckpointError: there is none.
        ConfigError: it describes another architecture.
    """
    if not exists(path / CONFIG):
        found = listing(path) if exists(path) and path.is_dir() else "nothing" if not exists(path) else "a file"
        raise CheckpointError(f"expected the folder of an {LABEL}, with {CONFIG} and weights, at {path}; found {found}")
    settings = read_object(path / CONFIG)
    kind = settings.get("model_type")
    if kind not in _MODEL_TYPES or "text_config" in settings:
        raise CheckpointError(
            f"expected the {LABEL} of CLIP in {path}, found a configuration of {str(kind)[:40]!r}; give the folder of a "
            "CLIPVisionModelWithProjection"
        )
    with sensible(LABEL):
        return ImageEncoderConfig.of(settings)


def empty_image_encoder(config: ImageEncoderConfig) -> ImageEncoder:
    """An image encoder on the meta device."""
    with sensible(LABEL), torch.device("meta"), NoInitialization():
        return ImageEncoder(config)


def places_beside(adapter: Path) -> Iterator[Path]:
    """Where the image encoder of an adapter may lie, in the layout of the authors (h94/IP-Adapter): in `image_encoder`
    beside it, or, of adapters of SDXL that use the smaller one, in `models/image_encoder`."""
    folder = adapter.parent if adapter.parent.name else adapter.parent.resolve()
    yield folder / _FOLDER
    for other in ("models", "sdxl_models"):
        if other != folder.name:
            yield folder.parent / other / _FOLDER
