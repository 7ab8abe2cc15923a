"""What unCLIP models have besides: the image encoder of CLIP, and the mean and deviation of its embeddings.

In the diffusers layout they are folders; in the original single file they lie at `embedder.model.visual.`, under OpenCLIP's
names, and the statistics, which files of other programs do not have, at `noise_augmentor.`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from latentdiff.checkpoints import tables
from latentdiff.checkpoints.image_encoder import LABEL, ImageEncoderWeights, empty_image_encoder
from latentdiff.checkpoints.keymap import KeyMap, Shape, check_floats, compare
from latentdiff.checkpoints.modules import POSITION_IDS, sensible, shapes_of
from latentdiff.checkpoints.raw import RawModel
from latentdiff.errors import CheckpointError
from latentdiff.networks.image_encoder import ImageEncoderConfig

ENCODER, STATISTICS = "image_encoder", "image_normalizer"
_VISUAL = "embedder.model.visual."
_MEAN, _DEVIATION = "noise_augmentor.data_mean", "noise_augmentor.data_std"
_NAMES = {"mean": _MEAN, "std": _DEVIATION}
_UNSCALED = 1024  # width of ViT-H's embeddings: the model that sees them was trained with 0 and 1
_PROJECTION = "visual_projection.weight"
_POSITIONS = POSITION_IDS.replace("text_model", "vision_model")
_EMBEDDINGS = {
    "vision_model.embeddings.class_embedding": "class_embedding",
    "vision_model.embeddings.patch_embedding": "conv1",
    "vision_model.embeddings.position_embedding.weight": "positional_embedding",
    "vision_model.pre_layrnorm": "ln_pre",
    "vision_model.post_layernorm": "ln_post",
    _PROJECTION: "proj",
}


@dataclass(frozen=True, eq=False)
class SeenImages:
    """How an unCLIP model sees images.

    mean, deviation: (1, D), of the embeddings, by which they are normalised before noise is added.
    is_known: whether these are those of the training, or 0 and 1 in their place.
    """

    encoder: ImageEncoderWeights
    mean: Tensor
    deviation: Tensor
    is_known: bool = True


def seen_images(raw: RawModel, class_dim: int) -> SeenImages:
    """What a model brought to see images with.

    Raises:
        CheckpointError: it is incomplete or damaged, or its embeddings are of another width than the U-Net takes.
    """
    if ENCODER not in raw.beside:
        raise CheckpointError(f"{raw.source} is an unCLIP model without its {LABEL}; download it again, with all parts")
    tensors = {name: tensor for name, tensor in raw.beside[ENCODER].items() if name != _POSITIONS}
    with sensible(LABEL):
        config = ImageEncoderConfig.of(raw.configs[ENCODER])
    compare(LABEL, shapes_of(empty_image_encoder(config).state_dict()), shapes_of(tensors)).raise_unless_fits(
        raw.source
    )
    check_floats(LABEL, raw.source, tensors)
    width = config.projection_dim
    if 2 * width != class_dim:
        raise CheckpointError(
            f"the model's parts do not fit: the U-Net is told {class_dim} numbers, expected twice the {width} of the {LABEL}"
        )
    statistics = raw.beside.get(STATISTICS, {})
    found = [statistics.get(name) for name in ("mean", "std")]
    values = [usual if own is None else own.float().reshape(1, -1) for own, usual in zip(
        found, (torch.zeros(1, width), torch.ones(1, width)), strict=True
    )]  # fmt: skip
    if any(value.shape != (1, width) for value in values):
        raise CheckpointError(f"the statistics of embeddings in {raw.source} are of another width than {width}")
    weights = ImageEncoderWeights(raw.source, tensors, config)
    return SeenImages(weights, *values, is_known=None not in found or width == _UNSCALED)


def beside_of(images: SeenImages) -> tuple[dict[str, dict[str, Tensor]], dict[str, dict[str, Any]]]:
    """The tensors and the configurations of the two folders."""
    tensors = {ENCODER: dict(images.encoder.tensors), STATISTICS: {"mean": images.mean, "std": images.deviation}}
    config = {**_WRITTEN, **vars(images.encoder.config)}
    return tensors, {ENCODER: config, STATISTICS: _statistics_config(images.mean.shape[1])}


_WRITTEN = {"architectures": ["CLIPVisionModelWithProjection"], "model_type": "clip_vision_model", "dtype": "float32"}


def _statistics_config(width: int) -> dict[str, Any]:
    return {"_class_name": "StableUnCLIPImageNormalizer", "embedding_dim": width}


def taken_from(extras: dict[str, Tensor], configs: dict[str, dict[str, Any]]) -> dict[str, dict[str, Tensor]]:
    """Take the two out of what an original single file holds besides the parts, and put their configurations into
    `configs`, where it does not say them.

    Raises:
        CheckpointError: tensors from which the sizes are read are missing.
    """
    visual = {name.removeprefix(_VISUAL): tensor for name, tensor in extras.items() if name.startswith(_VISUAL)}
    if not visual:
        return {}
    try:
        config = _inferred(shapes_of(visual))
    except (KeyError, StopIteration) as error:
        raise CheckpointError(f"the file's {LABEL} is incomplete: the tensor {error} is missing") from error
    configs.setdefault(ENCODER, config)
    table = _visual_map(configs[ENCODER]["num_hidden_layers"])
    renamed = {ours: tensor for name, tensor in visual.items() if (ours := table.to_ours(name)) is not None}
    renamed = {name: tensor.T if name == _PROJECTION else tensor for name, tensor in renamed.items()}
    found = {ENCODER: tables.to_transformers(renamed)}
    if _MEAN in extras and _DEVIATION in extras:
        found[STATISTICS] = {ours: extras.pop(theirs) for ours, theirs in _NAMES.items()}
        configs.setdefault(STATISTICS, _statistics_config(config["projection_dim"]))
    for name in visual:
        if table.to_ours(name) is not None:
            del extras[_VISUAL + name]
    return found


def original_names(raw: RawModel) -> dict[str, Tensor]:
    """The two under the names of an original single file."""
    if ENCODER not in raw.beside:
        return {}
    table = _visual_map(raw.configs[ENCODER]["num_hidden_layers"])
    joined = tables.to_open_clip(raw.beside[ENCODER])
    joined = {
        name: tensor.T if name == _PROJECTION else tensor for name, tensor in joined.items() if name != _POSITIONS
    }
    found = {f"{_VISUAL}{table.to_theirs(name)}": tensor for name, tensor in joined.items()}
    return found | {_NAMES[name]: tensor for name, tensor in raw.beside.get(STATISTICS, {}).items()}


def _visual_map(layers: int) -> KeyMap:
    pairs = list(_EMBEDDINGS.items())
    for layer in range(layers):
        ours, theirs = f"vision_model.encoder.layers.{layer}", f"transformer.resblocks.{layer}"
        pairs += tables.open_clip_layer(ours, theirs)
    return KeyMap(pairs)


def _inferred(shapes: Mapping[str, Shape]) -> dict[str, Any]:
    """The configuration that the shapes of a visual tower show. OpenAI's ViT-L, of width 1024, has another activation than
    OpenCLIP's; heads are 64 wide, of OpenCLIP's ViT-H 80."""
    width, _, patch, _ = shapes["conv1.weight"]
    places = shapes["positional_embedding"][0] - 1
    layers = {match[1] for name in shapes if (match := re.match(r"transformer\.resblocks\.(\d+)\.", name))}
    return {
        **_WRITTEN,
        "hidden_act": "gelu" if width > 1024 else "quick_gelu",
        "hidden_size": width,
        "image_size": patch * round(places**0.5),
        "intermediate_size": shapes["transformer.resblocks.0.mlp.c_fc.weight"][0],
        "num_attention_heads": max(1, width // (80 if width == 1280 else 64)),
        "num_hidden_layers": len(layers),
        "patch_size": patch,
        "projection_dim": shapes["proj"][1],
    }
