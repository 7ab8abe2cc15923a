"""What all kinds of damaged files have in common, and the model that they are used with."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from latentdiff.checkpoints.components import Components, save_folder
from latentdiff.checkpoints.tokenizer import open_tokenizer
from latentdiff.diffusion.config import ScheduleConfig
from latentdiff.errors import LatentDiffError
from latentdiff.networks.config import UNetConfig, VAEConfig
from latentdiff.networks.text_encoder import TextEncoder
from latentdiff.networks.unet import UNet
from latentdiff.networks.vae import VAE
from tests import tiny


class Unusable(Exception):
    """What was read cannot be used."""


@dataclass
class Mutant:
    """A damaged file: what was done, to which seed, and whether a checksum in it could tell."""

    path: Path
    what: str
    seed: int = 0
    can_tell: bool = False


def used(use: Callable[[], Any]) -> Any:
    """The result of `use`; what it raises besides errors of ours becomes Unusable."""
    try:
        return use()
    except LatentDiffError:
        raise
    except MemoryError:
        raise
    except Exception as error:
        raise Unusable(f"{type(error).__name__}: {error}") from error


def digest(tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Tensors in a form that is compared by value, NaN too."""
    bits = {name: tensor.detach().contiguous().reshape(-1).view(torch.uint8) for name, tensor in tensors.items()}
    return {
        name: f"{tensors[name].dtype} {tuple(tensors[name].shape)} {hashlib.sha1(flat.numpy().tobytes()).hexdigest()}"
        for name, flat in bits.items()
    }


def tiny_model(folder: Path) -> Path:
    """A whole model with random weights, half a megabyte, as a folder."""
    tiny.save_tokenizer(folder / "words", max_length=16)
    tokenizer = open_tokenizer({path.name: path.read_text(encoding="utf-8") for path in (folder / "words").iterdir()})
    text = {
        "vocab_size": tokenizer.highest + 1, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "max_position_embeddings": 16,
    }  # fmt: skip
    unet = UNetConfig(
        sample_size=8, block_out_channels=(8, 8), layers_per_block=1, attention_levels=(True, False), num_heads=(2, 2),
        cross_attention_dim=16, norm_num_groups=4,
    )  # fmt: skip
    vae = VAEConfig(block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4, sample_size=16)
    torch.manual_seed(0)
    parts = Components(tokenizer, TextEncoder(text), UNet(unet), VAE(vae), ScheduleConfig())
    save_folder(parts, folder / "model")
    return folder / "model"


class Reader:
    """Seeds of one kind of file, their mutants, and reading them."""

    name = ""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.seeds = self.make(folder)
        self._expected = [self.read(seed) for seed in self.seeds]

    def make(self, folder: Path) -> list[Path]:
        raise NotImplementedError

    def mutate(self, rng: random.Random, folder: Path) -> Mutant:
        raise NotImplementedError

    def read(self, path: Path) -> Any:
        raise NotImplementedError

    def expected(self, seed: int) -> Any:
        return self._expected[seed]

    def pick(self, rng: random.Random, folder: Path) -> tuple[int, Path, Path]:
        number = rng.randrange(len(self.seeds))
        return number, self.seeds[number], folder / self.seeds[number].name
