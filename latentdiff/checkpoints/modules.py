"""From a raw model to modules: built without memory, filled with the mapped tensors, checked strictly."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from latentdiff.checkpoints.families import is_text
from latentdiff.checkpoints.keymap import Shape, compare
from latentdiff.checkpoints.mapping import fill, put
from latentdiff.checkpoints.raw import PART_LABELS, RawModel
from latentdiff.diffusion.config import ScheduleConfig
from latentdiff.errors import CheckpointError, ConfigError, LatentDiffError
from latentdiff.networks.config import UNetConfig, VAEConfig
from latentdiff.networks.text_encoder import TextEncoder, TextTransformerConfig
from latentdiff.networks.tiny_vae import NAME as TINY_VAE
from latentdiff.networks.tiny_vae import TinyVAE, TinyVAEConfig
from latentdiff.networks.unet import UNet
from latentdiff.networks.vae import VAE

_CONFIGS = {"unet": UNetConfig, "vae": VAEConfig, "scheduler": ScheduleConfig, "low_res_scheduler": ScheduleConfig,
            "image_noising_scheduler": ScheduleConfig}  # fmt: skip

# A table of 0, 1, 2, ... that older transformers saved with the weights.
POSITION_IDS = "text_model.embeddings.position_ids"


def parse_config(part: str, config: dict[str, Any]) -> UNetConfig | VAEConfig | ScheduleConfig:
    """Read the configuration of "unet", "vae" or a scheduler.

    Raises:
        ConfigError: it is not one of Stable Diffusion, or makes no sense.
    """
    with sensible(part):
        return (TinyVAEConfig if _is_tiny(part, config) else _CONFIGS[part]).from_diffusers(config)


def empty_module(part: str, config: dict[str, Any], found: int | None = None) -> nn.Module:
    """Build a part on the meta device, where it has shapes and no memory; see `expected_shapes`.

    Raises:
        ConfigError: the configuration is not one of Stable Diffusion, or makes no sense.
    """
    if found is not None:
        _check_size(part, config, found)
    if is_text(part):
        build, config_of_part = TextEncoder, config
    else:
        networks = {"unet": UNet, "vae": TinyVAE if _is_tiny(part, config) else VAE}
        build, config_of_part = networks[part], parse_config(part, config)
    with sensible(part), torch.device("meta"), NoInitialization():
        return build(config_of_part)


def _check_size(part: str, config: dict[str, Any], found: int) -> None:
    """Compare the layers that a configuration describes with the weights that there are: each has eight or more."""
    with sensible(part):
        if is_text(part):
            layers = TextTransformerConfig.of(config).num_hidden_layers
        else:
            read = parse_config(part, config)
            layers = 2 * len(read.block_out_channels) * read.layers_per_block
            layers += 2 * read.layers_per_block * sum(getattr(read, "transformer_depth", ()))
    # A level without attention has no transformers, whatever its depth says: hence the factor.
    if layers * 8 > max(found, 1) * 2:
        raise ConfigError(
            f"the configuration of the {PART_LABELS[part]} describes {layers} layers, far more than its {found} weights "
            "make; take the configuration that belongs to them"
        )


def _is_tiny(part: str, config: dict[str, Any]) -> bool:
    return part == "vae" and config.get("_class_name") == TINY_VAE


class NoInitialization(TorchFunctionMode):
    """Inside, torch.nn.init draws nothing: its `normal_` on the meta device loads torch's compiler, which takes a
    second."""

    def __torch_function__(self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(function, "__module__", None) == nn.init.__name__:
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return function(*args, **kwargs)


@contextmanager
def sensible(part: str) -> Iterator[None]:
    """A value of the wrong type fails somewhere inside a constructor; say whose configuration it came from."""
    try:
        yield
    except LatentDiffError:
        raise
    except Exception as error:  # transformers' validators have exceptions of their own
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(
            f"the configuration of the {PART_LABELS.get(part, part)} makes no sense: {reason}; download it again"
        ) from error


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, Shape]:
    """Name -> shape."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def expected_shapes(part: str, config: dict[str, Any], found: int | None = None) -> dict[str, Shape]:
    """Names and shapes of a part's weights, as its configuration wants them.

    Args:
        found: how many weights there are; a configuration that wants many more is refused before anything is built.

    Raises:
        ConfigError: it does, or makes no sense.
    """
    return shapes_of(empty_module(part, config, found).state_dict())


def check_fits(raw: RawModel, part: str, expected: Mapping[str, Shape] | None = None) -> None:
    """Compare a part's tensors with its configuration, or with the shapes that it gives.

    Raises:
        CheckpointError: names, shapes or types do not fit.
    """
    tensors = weights_of(raw, part)
    expected = expected_shapes(part, raw.configs[part], len(tensors)) if expected is None else expected
    compare(PART_LABELS[part], expected, shapes_of(tensors)).raise_unless_fits(raw.source)
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise CheckpointError(
                f"{PART_LABELS[part]} of {raw.source} holds {tensor.dtype} weights ({name}), expected "
                "floating-point ones; quantised files are not supported"
            )


def check_made_for(label: str, path: Path, facts: Mapping[str, tuple[Any, Any]]) -> None:
    """Refuse a file of something beside a model that was made for another one.

    Args:
        label: what it is.
        facts: in words -> what it has, and what the model wants.

    Raises:
        CheckpointError: two differ.
    """
    for name, (found, expected) in facts.items():
        if found != expected:
            raise CheckpointError(
                f"{path.name} is {label} for another model: {name} {found}, expected {expected}; take one that was made "
                "for the family of this model"
            )


def module_without_weights(
    raw: RawModel, part: str, dtype: torch.dtype | None = None
) -> tuple[nn.Module, dict[str, Tensor]]:
    """A part on the meta device in `dtype`, or in that of the file, and the raw model's tensors for it; see
    `mapping.fill`.

    Raises:
        CheckpointError: names, shapes or types do not fit the configuration.
    """
    module = empty_module(part, raw.configs[part], len(raw.tensors[part]))
    check_fits(raw, part, shapes_of(module.state_dict()))
    tensors = weights_of(raw, part)
    if dtype is None:
        for name, tensor in tensors.items():
            put(module, name, tensor.to("meta"))
    else:
        module.to(dtype)
    return module.eval(), tensors


def build_module(raw: RawModel, part: str, dtype: torch.dtype | None = None) -> nn.Module:
    """Build a part around the raw model's tensors, without copying them unless `dtype` differs from theirs.

    Raises:
        CheckpointError: names, shapes or types do not fit the configuration.
    """
    module, tensors = module_without_weights(raw, part, dtype)
    fill(module, tensors)
    return module


def weights_of(raw: RawModel, part: str) -> dict[str, Tensor]:
    """The tensors of a part that are weights."""
    return {name: tensor for name, tensor in raw.tensors[part].items() if name != POSITION_IDS}
