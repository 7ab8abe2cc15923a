"""Damaged upscalers: the tensors of a small ESRGAN in the names of its first code, in safetensors and wrapped in a pickle."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from latentdiff.checkpoints.inspection import inspect
from latentdiff.checkpoints.upscalers import read_upscaler
from tools.fuzzing import mutations as damage
from tools.fuzzing.readers import Mutant, Reader, digest, used

LAYERS = (
    "model.0", "model.1.sub.0.RDB1.conv1.0", "model.1.sub.0.RDB2.conv1.0", "model.1.sub.1", "model.3", "model.6", "model.8",
)  # fmt: skip


class Upscaler(Reader):
    name = "upscaler"

    def make(self, folder: Path) -> list[Path]:
        tensors = {f"{name}.weight": torch.rand(4, 4, 3, 3) for name in LAYERS}
        tensors |= {f"{name}.bias": torch.rand(4) for name in LAYERS}
        save_file(tensors, folder / "4x.safetensors")
        torch.save({"params_ema": tensors}, folder / "4x.pth")
        return [folder / "4x.safetensors", folder / "4x.pth"]

    def mutate(self, rng: random.Random, folder: Path) -> Mutant:
        number, source, path = self.pick(rng, folder)
        is_plain = source.suffix == ".pth" or rng.random() < 0.3
        path.write_bytes((damage.bytes_of if is_plain else _header)(rng, source.read_bytes()))
        return Mutant(path, "bytes" if is_plain else "header", number)

    def read(self, path: Path) -> Any:
        str(inspect(path))
        tensors = read_upscaler(path)
        return used(lambda: digest(tensors))


def _header(rng: random.Random, data: bytes) -> bytes:
    return damage.header_of(rng, data, lambda header: damage.value_of(rng, header))
