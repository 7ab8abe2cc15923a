"""T2I-Adapter files: diffusers folders, single files in its names, and those of the original code (TencentARC).

    diffusers                                  original, full            original, light
    adapter.conv_in                            conv_in
    adapter.body.L.in_conv                     body.K.in_conv            body.L.in_conv
    adapter.body.L.resnets.J.block1, block2    body.K.block1, block2     body.L.body.J.block1, block2
    adapter.body.L.out_conv                                              body.L.out_conv

with K = J + L times the blocks of a level.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latentdiff.checkpoints.files import read_tensors
from latentdiff.checkpoints.folder import weight_files
from latentdiff.checkpoints.hub import locate
from latentdiff.checkpoints.keymap import KeyMap, Shape, check_floats, compare
from latentdiff.checkpoints.modules import NoInitialization, sensible, shapes_of
from latentdiff.checkpoints.prefixes import unwrapped
from latentdiff.errors import CheckpointError, ConfigError
from latentdiff.networks.t2i_adapter import T2IAdapterConfig, T2IAdapterNetwork
from latentdiff.reading.json import read_object

LABEL = "T2I-Adapter"
_OURS = "adapter."
_LEVELS = 4  # of every published one
_SEEN = {
    64: (1, 8),
    192: (3, 8),
    256: (1, 16),
    768: (3, 16),
}  # channels after the unshuffling -> of the hint, and factor
_FIRST = ("body.0.block1.weight", "body.0.body.0.block1.weight", "adapter.body.0.resnets.0.block1.weight")
_STYLE = ("transformer_layes.", "style_embedding", "spatial_ch_projs.")  # so spelt in the files
_CONTROLNET = ("controlnet_", "control_model.", "time_embed")
_CLASS = "T2IAdapter"


@dataclass(frozen=True, eq=False)
class T2IAdapterWeights:
    """The weights of a T2I-Adapter under the names of the diffusers layout, and its configuration."""

    path: Path
    tensors: dict[str, Tensor]
    config: T2IAdapterConfig


def is_t2i_adapter(names: Iterable[str]) -> bool:
    """Whether these are the tensors of a T2I-Adapter, or of its relatives that see no hint."""
    names = list(names)
    if any(name.startswith(_CONTROLNET) for name in names):
        return False  # those for several kinds of hints have `spatial_ch_projs` too
    return any(name in _FIRST or name.startswith(_STYLE) for name in names)


def read_t2i_adapter(source: str | os.PathLike[str]) -> T2IAdapterWeights | None:
    """Read a T2I-Adapter from a folder, a hub id or a file; None if it is something else.

    Raises:
        CheckpointError: nothing is there, or it is damaged, incomplete or of a kind that is not supported.
        ConfigError: its configuration describes another architecture.
    """
    path = locate(source)
    files = weight_files(path.parent, path.name, "unet") if path.is_dir() else [path]
    tensors: dict[str, Tensor] = {}
    for file in files:
        tensors |= unwrapped(read_tensors(file).tensors)
    if not is_t2i_adapter(tensors):
        return None
    if any(name.startswith(_STYLE) for name in tensors):
        raise CheckpointError(
            f"{path} is a style or composing {LABEL}, which is not supported; take one that follows a hint, or an IP-Adapter"
        )
    beside = path / "config.json" if path.is_dir() else path.parent / "config.json"
    settings = read_object(beside) if beside.exists() else {}
    settings = settings if settings.get("_class_name") == _CLASS else {}
    try:
        config = _config(shapes_of(tensors), settings)
    except (KeyError, IndexError, ValueError) as error:
        raise CheckpointError(f"the sizes of the {LABEL} in {path} cannot be read: {error} is missing") from error
    if not any(name.startswith(_OURS) for name in tensors):
        table = t2i_map(config)
        tensors = {table.to_ours(name) or name: tensor for name, tensor in tensors.items()}
    compare(LABEL, shapes_of(empty_t2i_adapter(config).state_dict()), shapes_of(tensors)).raise_unless_fits(path)
    check_floats(LABEL, path, tensors)
    return T2IAdapterWeights(path, tensors, config)


def t2i_map(config: T2IAdapterConfig) -> KeyMap:
    """The names in the diffusers layout and in the original one."""
    pairs = [] if config.light else [("adapter.conv_in", "conv_in")]
    for level in range(len(config.channels)):
        theirs = f"body.{level if config.light else level * config.blocks}"
        pairs += [(f"adapter.body.{level}.{name}", f"{theirs}.{name}") for name in ("in_conv", "out_conv")]
        for block in range(config.blocks):
            inner = f"{theirs}.body.{block}" if config.light else f"body.{level * config.blocks + block}"
            pairs += [
                (f"adapter.body.{level}.resnets.{block}.{name}", f"{inner}.{name}") for name in ("block1", "block2")
            ]
    return KeyMap(pairs)


def empty_t2i_adapter(config: T2IAdapterConfig) -> T2IAdapterNetwork:
    """A T2I-Adapter on the meta device."""
    with sensible(LABEL), torch.device("meta"), NoInitialization():
        return T2IAdapterNetwork(config)


def _config(shapes: Mapping[str, Shape], settings: Mapping[str, Any]) -> T2IAdapterConfig:
    """What the shapes show. A `config.json` tells how pixels are gathered where that is unusual."""
    own = {name.removeprefix(_OURS): shape for name, shape in shapes.items()}
    light = "conv_in.weight" not in own
    is_original = not any(name.startswith(_OURS) for name in shapes)
    seen = own["body.0.in_conv.weight" if light else "conv_in.weight"][1]
    if seen not in _SEEN and not settings:
        known = ", ".join(map(str, _SEEN))
        raise ConfigError(f"expected a {LABEL} whose first convolution sees {known} channels, found {seen}")
    channels, unshuffle = _SEEN.get(seen, (0, 0))
    channels, unshuffle = settings.get("in_channels", channels), settings.get("downscale_factor", unshuffle)
    if (
        channels not in (1, 3)
        or unshuffle not in (8, 16)
        or settings.get("adapter_type") not in _types(light, unshuffle)
    ):
        raise ConfigError(
            f"expected a {LABEL} that sees 1 or 3 channels at 8 or 16 pixels for a latent, found "
            f"{str((channels, unshuffle, settings.get('adapter_type')))[:60]}"
        )
    count = len({name.split(".")[1] for name in own if name.startswith("body.")})
    if light:
        inside = "body.0.body." if is_original else "body.0.resnets."
        levels, blocks = count, len({name.split(".")[3] for name in own if name.startswith(inside)})
        widths = [own[f"body.{level}.out_conv.weight"][0] for level in range(levels)]
    elif is_original:
        levels, blocks = _LEVELS, count // _LEVELS
        widths = [own[f"body.{level * blocks}.block1.weight"][0] for level in range(levels)]
    else:
        levels, blocks = count, len({name.split(".")[3] for name in own if name.startswith("body.0.resnets.")})
        widths = [own[f"body.{level}.resnets.0.block1.weight"][0] for level in range(levels)]
    return T2IAdapterConfig(
        light=light, in_channels=channels, unshuffle=unshuffle, channels=tuple(widths), blocks=blocks
    )


def _types(light: bool, unshuffle: int) -> tuple[str | None, ...]:
    """What configurations call such an adapter; None is none."""
    if light:
        return (None, "light_adapter")
    return (None, "full_adapter_xl") if unshuffle == 16 else (None, "full_adapter")
