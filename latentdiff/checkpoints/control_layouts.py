"""Writing ControlNets, as a folder that opens in diffusers or as one file in the original layout, and converting them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from latentdiff.checkpoints.control import (
    CONFIG,
    DIFFERENCE,
    PREFIX,
    STATED,
    WEIGHTS,
    ControlWeights,
    read_control,
    to_original,
    whole_weights,
)
from latentdiff.checkpoints.conversion import read_model
from latentdiff.checkpoints.folder import replaced_folder, save_tensors
from latentdiff.errors import UsageError

_OWN_PREFIX = "latentdiff.prefix"  # in the metadata of a folder's weights: how their names began in the original layout


def convert_control(
    source: str | os.PathLike[str], target: str | os.PathLike[str], base: str | os.PathLike[str] | None = None
) -> None:
    """Convert a ControlNet to the other layout; there and back, names, types and bits are the same.

    Args:
        source: a diffusers folder, a hub id, or a file in either layout.
        target: a name that ends in `.safetensors` for one file in the original layout, or that of a folder for diffusers.
        base: the model that a file with differences was trained on, which are then added to it.

    Raises:
        UsageError: the target is in the source's layout, or the other layout cannot hold what it is.
        CheckpointError: the source is no ControlNet, or the target holds something else.
    """
    target, weights = Path(target), read_control(source)
    to_file = target.suffix == ".safetensors"
    if target.suffix in (".pth", ".pt", ".bin", ".ckpt"):
        raise UsageError(f"{target}: pickles are read, not written; give a name that ends in .safetensors")
    if to_file and weights.prefix is not None:
        raise UsageError(f"{source} is in the original layout already; give the name of a folder for that of diffusers")
    if not to_file and weights.path.is_dir():
        raise UsageError(f"{source} is a diffusers folder already; give a name in .safetensors for the original layout")
    if base is not None and not weights.is_difference:
        raise UsageError(f"{source} holds whole weights; leave out --base")
    if to_file:
        write_control_file(weights, target)
    else:
        metadata = _kept(weights) | ({} if weights.prefix in (None, PREFIX) else {_OWN_PREFIX: weights.prefix})
        settings = weights.settings or weights.config.to_diffusers()
        write_control_folder(_added_up(weights, base), settings, target, metadata)


def write_control_folder(
    tensors: Mapping[str, Tensor], settings: Mapping[str, Any], folder: Path, metadata: Mapping[str, str]
) -> None:
    """Write a ControlNet as a folder that opens in diffusers, too; whole or not at all.

    Args:
        tensors: under the names of the diffusers layout; they keep their types.
        settings: the configuration.
        metadata: beside the tensors in their file.

    Raises:
        CheckpointError: `folder` holds something else than a ControlNet, or cannot be written.
    """
    with replaced_folder(folder, (CONFIG, WEIGHTS), CONFIG) as temporary:
        (temporary / CONFIG).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        save_tensors(tensors, temporary / WEIGHTS, {"format": "pt", **metadata})


def write_control_file(weights: ControlWeights, path: Path) -> None:
    """Write a ControlNet as one file in the original layout, atomically; its configuration goes into the metadata.

    Raises:
        UsageError: the original layout has no names for a network for several kinds of hints.
        LatentDiffError: the file cannot be written.
    """
    config = weights.config
    if config.modes:
        raise UsageError(
            f"{weights.path.name} is a ControlNet for several kinds of hints, which has the names of diffusers alone"
        )
    settings = weights.settings or config.to_diffusers()
    prefix = weights.metadata.get(_OWN_PREFIX, PREFIX)
    metadata = {"format": "pt", **_kept(weights), STATED: json.dumps(settings)}
    save_tensors(to_original(weights.tensors, config, prefix), path, metadata)


def _kept(weights: ControlWeights) -> dict[str, str]:
    """What the source's metadata say to people."""
    return {name: text for name, text in weights.metadata.items() if name not in ("format", STATED, _OWN_PREFIX)}


def _added_up(weights: ControlWeights, base: str | os.PathLike[str] | None) -> Mapping[str, Tensor]:
    if not weights.is_difference:
        return weights.tensors
    if base is None:
        raise UsageError(
            f"{weights.path.name} holds differences ({DIFFERENCE}), for which diffusers has no place; name the model that"
            " they are added to with --base MODEL"
        )
    whole = whole_weights(weights, read_model(base).tensors["unet"])
    return {name: tensor.to(weights.tensors[name].dtype) for name, tensor in whole.items()}
