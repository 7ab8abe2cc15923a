"""The networks of a run: made with seeded weights, written and read between the stages."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from latentdiff.checkpoints.files import read_tensors
from latentdiff.checkpoints.folder import read_tokenizer, save_tensors
from latentdiff.checkpoints.tokenizer import open_tokenizer
from latentdiff.errors import CheckpointError, ConfigError
from latentdiff.files import atomic_path
from latentdiff.networks.config import UNetConfig, VAEConfig
from latentdiff.networks.text_encoder import TextEncoder
from latentdiff.networks.unet import UNet
from latentdiff.networks.vae import VAE
from latentdiff.prompts.tokenizer import Tokenizer
from latentdiff.reading.json import read_object
from latentdiff.training.data.randomness import torch_seed
from latentdiff.training.stages.config import TextEncoderSection

WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
TEXT_FILE = "text_encoder.safetensors"

_Network = TypeVar("_Network", bound=nn.Module)


def seeded(make: Callable[[], _Network], *key: int | str) -> _Network:
    """Make a network whose initial weights depend on `key` alone; the global random state stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(torch_seed(*key))
        return make()


def new_vae(config: VAEConfig, start: Path | None, seed: int) -> VAE:
    """An autoencoder with scaling factor 1 and seeded weights, or with those of the folder `start`.

    Raises:
        CheckpointError: `start` holds no autoencoder, or one of another configuration.
    """
    vae = seeded(lambda: VAE(replace(config, scaling_factor=1.0)), seed, "vae")
    if start is None:
        return vae
    other = load_vae(start)
    if replace(other.config, scaling_factor=1.0, sample_size=config.sample_size) != vae.config:
        raise CheckpointError(f"the VAE in {start} has another configuration than model.vae; they must be equal")
    vae.load_state_dict(other.state_dict())
    return vae


def new_unet(config: UNetConfig, seed: int) -> UNet:
    """A U-Net whose residual branches and output start at zero (Dhariwal & Nichol 2021), so that it starts as the
    identity."""
    unet = seeded(lambda: UNet(config), seed, "unet")
    for name, module in unet.named_modules():
        if name.endswith((".conv2", ".proj_out")) or name == "conv_out":
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    return unet


def take_weights(network: nn.Module, path: Path, configured: str) -> None:
    """Take the weights of a file of a model folder.

    Args:
        configured: what of the configuration the network was made by.

    Raises:
        CheckpointError: there is no such file, or its network has another configuration.
    """
    tensors = read_tensors(path).tensors
    wanted = {name: tensor.shape for name, tensor in network.state_dict().items()}
    if {name: tensor.shape for name, tensor in tensors.items()} != wanted:
        raise CheckpointError(f"the network in {path} has another configuration than {configured}; they must be equal")
    network.load_state_dict(tensors)


def new_text_encoder(section: TextEncoderSection, tokenizer: Any, seed: int) -> TextEncoder:
    """A CLIP text encoder for the vocabulary and the special tokens of a tokenizer."""
    config = {
        **section.model_dump(),
        "projection_dim": section.hidden_size,
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "dtype": "float32",  # in which transformers computes, whatever the files hold; diffusers asks for the same of all parts
    }
    return seeded(lambda: TextEncoder(config), seed, "text encoder")


def load_tokenizer(folder: Path, longest: int) -> Tokenizer:
    """Read a CLIP tokenizer from a folder.

    Raises:
        ConfigError: there is none, or it allows more tokens than the text encoder has positions.
    """
    try:
        tokenizer = open_tokenizer(read_tokenizer(folder))
    except CheckpointError as error:
        raise ConfigError(f"expected a CLIP tokenizer in {folder}: {error}") from error
    if tokenizer.model_max_length > longest:
        raise ConfigError(
            f"the tokenizer {folder} has model_max_length {tokenizer.model_max_length}, more than"
            f" text_encoder.max_position_embeddings {longest}"
        )
    return tokenizer


def save_text_encoder(text_encoder: TextEncoder, path: Path) -> None:
    """Write the weights of a text encoder into one file."""
    save_tensors(text_encoder.state_dict(), path, {})


def load_text_encoder(text_encoder: TextEncoder, path: Path) -> None:
    """Read what `save_text_encoder` wrote, into a text encoder of the same configuration.

    Raises:
        CheckpointError: it is not there or not whole.
    """
    if not path.is_file():
        raise CheckpointError(f"expected a taught text encoder in {path}, found none; run the stage text first")
    text_encoder.load_state_dict(read_tensors(path).tensors)


def save_vae(vae: VAE, scaling_factor: float, folder: Path) -> None:
    """Write a diffusers `vae/` folder; config.json comes last and says that it is whole."""
    save_tensors(vae.state_dict(), folder / WEIGHTS_FILE, {"format": "pt"})
    with atomic_path(folder / "config.json") as temporary:
        temporary.write_text(json.dumps(replace(vae.config, scaling_factor=scaling_factor).to_diffusers(), indent=2))


def load_vae(folder: Path) -> VAE:
    """Read what `save_vae` wrote.

    Raises:
        CheckpointError: it is not there or not whole.
    """
    config = folder / "config.json"
    if not config.is_file():
        raise CheckpointError(f"expected a trained VAE in {folder}, found none; run the stage vae first")
    vae = VAE(VAEConfig.from_diffusers(read_object(config)))
    vae.load_state_dict(read_tensors(folder / WEIGHTS_FILE).tensors)
    return vae
