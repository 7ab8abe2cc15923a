"""From a raw model to modules: built without memory, filled with the mapped tensors, checked strictly."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from latentdiff.checkpoints.keymap import Shape, compare
from latentdiff.checkpoints.raw import PART_LABELS, RawModel
from latentdiff.config import UNetConfig, VAEConfig
from latentdiff.errors import CheckpointError
from latentdiff.text_encoder import TextEncoder
from latentdiff.unet import UNet
from latentdiff.vae import VAE

# A table of 0, 1, 2, ... that older transformers saved with the weights.
POSITION_IDS = "text_model.embeddings.position_ids"


def empty_module(part: str, config: dict[str, Any]) -> nn.Module:
    """Build a part on the meta device, where it has shapes and no memory.

    Raises:
        ConfigError: the configuration is not one of Stable Diffusion 1.x or 2.x.
    """
    with torch.device("meta"):
        if part == "unet":
            return UNet(UNetConfig.from_diffusers(config))
        if part == "vae":
            return VAE(VAEConfig.from_diffusers(config))
        return TextEncoder(config)


def shapes_of(tensors: dict[str, Tensor]) -> dict[str, Shape]:
    """Name -> shape."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def expected_shapes(part: str, config: dict[str, Any]) -> dict[str, Shape]:
    """Names and shapes of a part's weights, as its configuration wants them."""
    return shapes_of(empty_module(part, config).state_dict())


def check_fits(raw: RawModel, part: str) -> None:
    """Compare a part's tensors with its configuration.

    Raises:
        CheckpointError: names, shapes or types do not fit.
    """
    tensors = {name: tensor for name, tensor in raw.tensors[part].items() if name != POSITION_IDS}
    expected = expected_shapes(part, raw.configs[part])
    compare(PART_LABELS[part], expected, shapes_of(tensors)).raise_unless_fits(raw.source)
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise CheckpointError(
                f"{PART_LABELS[part]} of {raw.source} holds {tensor.dtype} weights ({name}), expected "
                "floating-point ones; quantised files are not supported"
            )


def build_module(raw: RawModel, part: str, dtype: torch.dtype | None = None) -> nn.Module:
    """Build a part around the raw model's tensors, without copying them unless `dtype` differs from theirs.

    Raises:
        CheckpointError: names, shapes or types do not fit the configuration.
    """
    check_fits(raw, part)
    module = empty_module(part, raw.configs[part])
    tensors = {name: tensor for name, tensor in raw.tensors[part].items() if name != POSITION_IDS}
    if dtype is not None:
        tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    module.load_state_dict(tensors, assign=True)
    return module.eval()
