"""ControlNet files: diffusers folders, single files in its names, and the original layout, whole or as differences.

A file with a tensor called `difference` holds the weights of the way down minus those of the U-Net that it was trained
on; they are added up when it meets a U-Net.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latentdiff.checkpoints import tables
from latentdiff.checkpoints.architecture import identify
from latentdiff.checkpoints.files import read_tensors
from latentdiff.checkpoints.folder import weight_files
from latentdiff.checkpoints.hub import locate
from latentdiff.checkpoints.infer import infer_unet
from latentdiff.checkpoints.keymap import KeyMap, Shape, check_floats, compare
from latentdiff.checkpoints.modules import NoInitialization, sensible, shapes_of
from latentdiff.checkpoints.prefixes import unwrapped
from latentdiff.errors import CheckpointError
from latentdiff.networks.config import UNetConfig
from latentdiff.networks.controlnet import ControlNetConfig, ControlNetwork
from latentdiff.networks.union import UnionNetwork
from latentdiff.reading.json import parse_object, read_object
from latentdiff.request.options import CONTROL_MODES

DIFFERENCE = "difference"
STATED = "latentdiff.controlnet"  # in the metadata of a file in the original layout, the configuration
CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"
PREFIX = "control_model."
_MARK, _ORIGINAL_MARK = "controlnet_cond_embedding.conv_in.weight", "input_hint_block.0.weight"
_MOST_HINT_WIDTHS = 8
_CLASSES = ("ControlNetModel", "ControlNetUnionModel", "ControlNetModel_Union", None)
_UNION_MARK, _UNION_SIZES = "task_embedding", "control_add_embedding"
_LOW_RANK, _LLLITE = "lora_controlnet", "lllite_"
_LABEL = "ControlNet"


@dataclass(frozen=True)
class ControlWeights:
    """The weights of a ControlNet under the names of the diffusers layout, and its configuration.

    Attributes:
        guessed: the configuration is read off the tensors, in which not all of it shows.
        is_difference: the way down is to be added to that of a U-Net.
        prefix: before each name of the original layout, where the file is in that.
        settings: the configuration as it is stated.
        metadata: of the file.
    """

    path: Path
    tensors: dict[str, Tensor]
    config: ControlNetConfig
    guessed: bool
    is_difference: bool
    prefix: str | None = None
    settings: Mapping[str, Any] | None = None
    metadata: Mapping[str, str] = field(default_factory=dict[str, str])


def is_control(names: Iterable[str]) -> bool:
    """Whether these are the tensors of a ControlNet, alone or beside a model."""
    return any(name in (_MARK, _ORIGINAL_MARK, PREFIX + _ORIGINAL_MARK) for name in names)


def read_control(source: str | os.PathLike[str], *, pools: bool | None = None) -> ControlWeights:
    """Read a ControlNet from a folder, a hub id or a file; tensors are mapped and keep their types.

    Args:
        pools: whether its outputs are averaged over the image; None is what the configuration says, or for a file
            without one whether "shuffle" is in its name.

    Raises:
        CheckpointError: nothing is there, or it is damaged, incomplete, or of another kind.
        ConfigError: the configuration describes another architecture.
    """
    path = locate(source)
    files = weight_files(path.parent, path.name, "unet") if path.is_dir() else [path]
    tensors: dict[str, Tensor] = {}
    others: set[str] = set()
    metadata: dict[str, str] = {}
    for file in files:
        found = read_tensors(file)
        tensors |= unwrapped(found.tensors)
        others |= found.others.keys()
        metadata |= found.metadata
    if _LOW_RANK in tensors or any(name.startswith(_LLLITE) for name in tensors):
        raise CheckpointError(
            f"{path} is a Control-LoRA or a ControlNet-LLLite, which change the U-Net itself and are not here; take a {_LABEL}"
        )
    is_difference = tensors.pop(DIFFERENCE, None) is not None or DIFFERENCE in others
    beside = (path if path.is_dir() else path.parent) / CONFIG
    settings = read_object(beside) if _MARK in tensors and beside.exists() else None
    if settings is not None and path.is_file() and settings.get("_class_name") not in _CLASSES:
        settings = None  # of something else in the same folder
    if settings is None and STATED in metadata:
        settings = parse_object(metadata[STATED], f"the entry {STATED} of {path}", remedy="convert it from its source again")
    prefix = PREFIX if any(name.startswith(PREFIX) for name in tensors) else ""
    if prefix:
        tensors = {name.removeprefix(PREFIX): part for name, part in tensors.items() if name.startswith(PREFIX)}
    if not is_control(tensors):
        raise CheckpointError(f"expected a {_LABEL} in {path}, found {_found(tensors)}")
    shapes = shapes_of(tensors)
    try:
        config = _config(shapes, settings)
    except (KeyError, IndexError, StopIteration) as error:
        raise CheckpointError(f"the sizes of the {_LABEL} in {path} cannot be read: {error} is missing") from error
    if settings is None:
        named = "shuffle" in path.name.lower()
        config = _with_pools(config, named if pools is None else pools)
    elif pools is not None:
        config = _with_pools(config, pools)
    is_original = _ORIGINAL_MARK in tensors
    if is_original:
        tensors = to_ours(tensors, config, path)
    compare(_LABEL, expected_shapes(config), shapes_of(tensors)).raise_unless_fits(path)
    check_floats(_LABEL, path, tensors)
    return ControlWeights(
        path, tensors, config, settings is None, is_difference, prefix if is_original else None, settings, metadata
    )


def to_ours(tensors: Mapping[str, Tensor], config: ControlNetConfig, path: Path) -> dict[str, Tensor]:
    """From the names of the original layout, without `control_model.`, to those of diffusers.

    Raises:
        CheckpointError: a name has no place there.
    """
    table = control_map(config)
    lost = [name for name in tensors if table.to_ours(name) is None]
    if lost:
        raise CheckpointError(f"{path} holds more than a {_LABEL}: {', '.join(lost[:5])}")
    return {str(table.to_ours(name)): tensor for name, tensor in tensors.items()}


def to_original(tensors: Mapping[str, Tensor], config: ControlNetConfig, prefix: str = PREFIX) -> dict[str, Tensor]:
    """Inverse of `to_ours`, with a prefix before each name."""
    table = control_map(config)
    return {f"{prefix}{table.to_theirs(name)}": tensor for name, tensor in tensors.items()}


def control_map(config: ControlNetConfig) -> KeyMap:
    """The names of a ControlNet in the diffusers layout and in the original one."""
    return tables.control_map(config.unet, len(config.hint_widths))


def expected_shapes(config: ControlNetConfig) -> dict[str, Shape]:
    """Names and shapes of the weights that a configuration wants."""
    return shapes_of(empty_control(config).state_dict())


def empty_control(config: ControlNetConfig) -> ControlNetwork:
    """A ControlNet on the meta device."""
    with sensible(_LABEL), torch.device("meta"), NoInitialization():
        return UnionNetwork(config) if config.modes else ControlNetwork(config)


def whole_weights(weights: ControlWeights, base: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a control for a U-Net with the weights `base`: of differences, the sum in float32.

    Of a U-Net that sees more channels, as those for inpainting do, the first convolution counts with the latents'.
    """
    if not weights.is_difference:
        return weights.tensors
    whole = dict(weights.tensors)
    for name in weights.tensors.keys() & base.keys():
        own, beneath = weights.tensors[name], base[name]
        if name == "conv_in.weight":
            beneath = beneath[:, : own.shape[1]]
        whole[name] = own.float() + beneath.to(own.device).float()
    return whole


def _found(tensors: Mapping[str, Tensor]) -> str:
    identity = identify(shapes_of(tensors))
    what = "a Stable Diffusion model" if identity.kind == "model" else identity.family
    return f"{what} ({', '.join(list(tensors)[:3]) or 'no tensors at all'})"


def _with_pools(config: ControlNetConfig, pools: bool) -> ControlNetConfig:
    return replace(config, pools=pools)


def _config(shapes: Mapping[str, Shape], settings: Mapping[str, Any] | None) -> ControlNetConfig:
    union = _union(shapes)
    if settings is not None:
        with sensible(_LABEL):
            return ControlNetConfig.from_diffusers(settings, **union)
    if _ORIGINAL_MARK in shapes:
        channels = shapes["input_blocks.0.0.weight"][1]
        unet = infer_unet({**shapes, "out.2.weight": (channels,)}, large=False)
        # Every other convolution, from the second pair on, goes to the next width.
        below = [
            shapes[name][0]
            for n in range(1, _MOST_HINT_WIDTHS)
            if (name := f"input_hint_block.{4 * n}.weight") in shapes
        ]
        return ControlNetConfig(unet=unet, hint_widths=(shapes[_ORIGINAL_MARK][0], *below))
    blocks = [
        shapes[name][0]
        for n in range(_MOST_HINT_WIDTHS)
        if (name := f"controlnet_cond_embedding.blocks.{2 * n + 1}.weight") in shapes
    ]
    unet = _unet_by_our_names(shapes)
    if union:
        size_dim = shapes[f"{_UNION_SIZES}.linear_1.weight"][1] // union["modes"]
        unet = replace(unet, size_dim=size_dim)
    return ControlNetConfig(unet=unet, hint_widths=(shapes[_MARK][0], *blocks), **union)


def _union(shapes: Mapping[str, Shape]) -> dict[str, int]:
    """What the tensors show of a network for several kinds of hints; nothing of others."""
    if _UNION_MARK not in shapes:
        return {}
    modes = shapes[_UNION_MARK][0]
    if modes > len(CONTROL_MODES):
        raise CheckpointError(
            f"this {_LABEL} takes {modes} kinds of hints, of which {len(CONTROL_MODES)} are known: {', '.join(CONTROL_MODES)}"
        )
    layers = {name.split(".")[1] for name in shapes if name.startswith("transformer_layes.")}
    return {"modes": modes, "mixing_layers": len(layers)}


def _unet_by_our_names(shapes: Mapping[str, Shape]) -> UNetConfig:
    """What the shapes show of the U-Net; the rest is as `infer_unet` has it."""

    def count(prefix: str) -> int:
        return len({name[len(prefix) :].partition(".")[0] for name in shapes if name.startswith(prefix)})

    levels = range(count("down_blocks."))
    widths = tuple(shapes[f"down_blocks.{level}.resnets.0.conv1.weight"][0] for level in levels)
    linear = len(next(shape for name, shape in shapes.items() if name.endswith(".proj_in.weight"))) == 2
    to_k = next(shape for name, shape in shapes.items() if name.endswith(".attn2.to_k.weight"))
    depth = [max(count(f"down_blocks.{level}.attentions.0.transformer_blocks."), 1) for level in levels]
    return UNetConfig(
        in_channels=shapes["conv_in.weight"][1],
        block_out_channels=widths,
        layers_per_block=count("down_blocks.0.resnets."),
        attention_levels=tuple(f"down_blocks.{level}.attentions.0.norm.weight" in shapes for level in levels),
        num_heads=tuple(max(width // 64, 1) if linear else 8 for width in widths),
        cross_attention_dim=to_k[1],
        use_linear_projection=linear,
        norm_num_groups=math.gcd(32, *widths),
        transformer_depth=(*depth[:-1], count("mid_block.attentions.0.transformer_blocks.")),
        added_dim=shapes.get("add_embedding.linear_1.weight", (0, None))[1],
    )
