"""IP-Adapter files: `.bin` with two nested dictionaries, and `.safetensors` with the same names joined by a dot.

image_proj.*                                what makes tokens of an image; see `networks.ip_adapter`
ip_adapter.{1,3,5,...}.to_{k,v}_ip.weight   for each cross-attention, in the order of `cross_attentions`
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latentdiff.checkpoints.architecture import OF_IP_ADAPTER, identify, is_ip_adapter
from latentdiff.checkpoints.files import TensorFile, read_tensors
from latentdiff.checkpoints.folder import listing
from latentdiff.checkpoints.keymap import Shape, check_floats, compare
from latentdiff.checkpoints.modules import NoInitialization, sensible, shapes_of
from latentdiff.errors import CheckpointError
from latentdiff.networks.ip_adapter import HEAD, IPAdapterConfig, IPAdapterNetwork
from latentdiff.reading.plain import exists

LABEL = "IP-Adapter"
_LAYER = re.compile(r"ip_adapter\.(\d{1,4})\.to_k_ip\.weight")
_SUFFIXES = (".safetensors", ".bin")
_MOST_LAYERS = 512


@dataclass(frozen=True, eq=False)
class IPAdapterWeights:
    """The weights of an IP-Adapter under the names of its file, and what their shapes show."""

    path: Path
    tensors: dict[str, Tensor]
    config: IPAdapterConfig


def joined_names(file: TensorFile) -> dict[str, Tensor]:
    """The tensors of a file under the names of the safetensors form: those of nested dictionaries with a dot."""
    nested: dict[str, Tensor] = {}
    for part in OF_IP_ADAPTER:
        inside = file.others.get(part)
        if isinstance(inside, Mapping):
            nested |= {f"{part}.{name}": value for name, value in inside.items() if isinstance(value, Tensor)}
    return {**file.tensors, **nested}


def read_ip_adapter(source: str | os.PathLike[str]) -> IPAdapterWeights:
    """Read an IP-Adapter from a file, or a folder that holds one; tensors are mapped and keep their types.

    Raises:
        CheckpointError: nothing is there, or it is damaged, incomplete, or of another kind.
    """
    path = _file_in(Path(os.path.expanduser(os.fspath(source))))
    tensors = joined_names(read_tensors(path))
    if not is_ip_adapter(tensors):
        family = identify(shapes_of(tensors)).family
        raise CheckpointError(
            f"expected an {LABEL} in {path}, found {family} ({', '.join(list(tensors)[:3]) or 'nothing'})"
        )
    _refuse_faces(tensors, path)
    try:
        config = config_of(shapes_of(tensors))
    except (KeyError, IndexError, ValueError) as error:
        raise CheckpointError(
            f"the sizes of the {LABEL} in {path} cannot be read: {error} is missing or no matrix"
        ) from error
    compare(LABEL, expected_shapes(config), shapes_of(tensors)).raise_unless_fits(path)
    check_floats(LABEL, path, tensors)
    return IPAdapterWeights(path, tensors, config)


def config_of(shapes: Mapping[str, Shape]) -> IPAdapterConfig:
    """What the shapes of the tensors show.

    Raises:
        KeyError, IndexError, ValueError: one that tells a size is missing, or no matrix.
    """
    numbers = sorted(int(match[1]) for name in shapes if (match := _LAYER.fullmatch(name)))[:_MOST_LAYERS]
    layers = {str(number): shapes[f"ip_adapter.{number}.to_k_ip.weight"][0] for number in numbers}
    same: dict[str, Any] = {"layers": layers}
    if "image_proj.proj.weight" in shapes:
        out, seen = shapes["image_proj.proj.weight"]
        width = shapes["image_proj.norm.weight"][0]
        return IPAdapterConfig(kind="plain", image_width=seen, width=width, tokens=out // max(width, 1), **same)
    if "image_proj.proj.3.weight" in shapes:
        width, seen = shapes["image_proj.proj.2.weight"]
        return IPAdapterConfig(kind="full", image_width=seen, width=width, tokens=0, **same)
    inner, seen = shapes["image_proj.proj_in.weight"]
    depth = len({name.split(".")[2] for name in shapes if name.startswith("image_proj.layers.")})
    return IPAdapterConfig(
        kind="plus",
        image_width=seen,
        width=shapes["image_proj.proj_out.weight"][0],
        tokens=shapes["image_proj.latents"][1],
        inner=inner,
        depth=depth,
        heads=shapes["image_proj.layers.0.0.to_q.weight"][0] // HEAD,
        feed_forward=shapes["image_proj.layers.0.1.1.weight"][0],
        **same,
    )


def empty_ip_adapter(config: IPAdapterConfig) -> IPAdapterNetwork:
    """An IP-Adapter on the meta device."""
    with sensible(LABEL), torch.device("meta"), NoInitialization():
        return IPAdapterNetwork(config)


def expected_shapes(config: IPAdapterConfig) -> dict[str, Shape]:
    """Names and shapes of the weights that a configuration wants."""
    return shapes_of(empty_ip_adapter(config).state_dict())


def _refuse_faces(tensors: Mapping[str, Tensor], path: Path) -> None:
    """FaceID adapters are told by their LoRAs, by the norm behind two layers, or by the resampler within."""
    marks = ("image_proj.perceiver_resampler.", "image_proj.proj.0.")
    has_norm = "image_proj.norm.weight" in tensors and any(name.startswith(marks[1]) for name in tensors)
    if has_norm or any(name.startswith(marks[0]) or "_lora." in name for name in tensors):
        raise CheckpointError(
            f"{path} is an {LABEL} FaceID, which needs insightface to recognise faces and is not supported; take the full-face "
            "or the Plus kind"
        )


def _file_in(path: Path) -> Path:
    if not exists(path):
        raise CheckpointError(f"no such file or folder: {path}; expected an {LABEL} as .bin or .safetensors")
    if not path.is_dir():
        return path
    files = sorted(each for each in path.iterdir() if each.suffix in _SUFFIXES and each.is_file())
    if len(files) != 1:
        raise CheckpointError(f"expected one {LABEL} file in {path}, found {listing(path)}; name the file")
    return files[0]
