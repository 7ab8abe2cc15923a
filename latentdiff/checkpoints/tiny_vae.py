"""Files of the tiny autoencoder TAESD, as published (`taesd_encoder.safetensors`, `taesd_decoder.safetensors`, layers
by their places), as diffusers stores it, and with both halves in one file."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latentdiff.checkpoints.files import read_tensors
from latentdiff.errors import CheckpointError
from latentdiff.networks.config import VAEConfig
from latentdiff.networks.tiny_vae import TinyDecoder, TinyVAEConfig

_LAYER = re.compile(
    r"(?:(?P<half>encoder|decoder|taesd_encoder|taesd_decoder)\.)?(?P<own>layers\.)?(?P<place>\d+)\.(?P<leaf>.+)"
)
FACTOR = 8  # pixels per latent along one side


def is_tiny_vae(names: Iterable[str]) -> bool:
    """Whether these are the tensors of a tiny autoencoder, or of one half of it."""
    names = list(names)
    return bool(names) and all(_LAYER.fullmatch(name) for name in names) and any(".conv.4." in name for name in names)


def read_tiny_vae(
    path: Path, tensors: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Any], tuple[Path, ...]]:
    """Weights under diffusers' names, configuration, and the files: of a half, the other one is looked for beside it.

    Raises:
        CheckpointError: one half is nowhere.
    """
    files, halves = (path,), _halves(tensors)
    for half, other in (("encoder", "decoder"), ("decoder", "encoder")):
        beside = path.with_name(path.name.replace(other, half))
        if half not in halves and beside != path and beside.is_file():
            halves |= _halves(read_tensors(beside).tensors)
            files = (*files, beside)
        if half not in halves:
            raise CheckpointError(
                f"{path} holds only the {other} of a tiny autoencoder, expected both halves; put "
                f"{path.name.replace(other, half)} beside it"
            )
    config = TinyVAEConfig(latent_channels=halves["decoder"]["0.weight"].shape[1])
    named = {f"{half}.layers.{name}": tensor for half, own in sorted(halves.items()) for name, tensor in own.items()}
    return named, config.to_diffusers(), files


def load_tiny_decoder(path: str | os.PathLike[str]) -> TinyDecoder:
    """The decoder alone, in float32.

    Raises:
        CheckpointError: there is no file, it is damaged, or holds something else.
    """
    if not Path(path).is_file():
        raise CheckpointError(f"expected a tiny decoder at {path}, found no file")
    tensors = read_tensors(Path(path)).tensors
    own = _halves(tensors).get("decoder", {}) if is_tiny_vae(tensors) else {}
    first = own.get("0.weight")
    decoder = TinyDecoder(first.shape[1] if first is not None and first.ndim == 4 else 4)
    try:
        decoder.layers.load_state_dict({name: tensor.float() for name, tensor in own.items()}, strict=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"{path} is no tiny decoder in the layout of taesd_decoder.safetensors: {reason}"
        ) from error
    return decoder.eval().requires_grad_(False)


def check_decoder_fits(decoder: TinyDecoder, vae: VAEConfig) -> None:
    """Raise a CheckpointError if the latents of a model with this VAE are not what the decoder takes."""
    found, expected = (decoder.latent_channels, FACTOR), (vae.latent_channels, vae.downscale)
    if found != expected:
        raise CheckpointError(
            f"expected a tiny decoder for latents of {expected[0]} channels, {expected[1]} times smaller than the image, "
            f"found one for {found[0]} channels, {found[1]} times smaller; leave it out to preview with the VAE"
        )


def _halves(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Per half, tensors by place and name as diffusers counts: published decoders count a clamp before the first."""
    halves: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        match = _LAYER.fullmatch(name)
        if match is None:
            continue
        half = (match["half"] or _half_of(tensors)).removeprefix("taesd_")
        shift = 1 if half == "decoder" and not match["own"] else 0
        halves.setdefault(half, {})[f"{int(match['place']) - shift}.{match['leaf']}"] = tensor
    return halves


def _half_of(tensors: Mapping[str, Tensor]) -> str:
    """Encoders begin with a convolution of the image; decoders have their first one behind the clamp."""
    first: Tensor = tensors.get("0.weight", torch.empty(0))
    return "encoder" if first.ndim == 4 else "decoder"
