"""Damaged ControlNets: folders with their configuration, and files of the original layout."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from latentdiff.checkpoints.control import empty_control, read_control, to_original
from latentdiff.checkpoints.inspection import inspect
from latentdiff.checkpoints.mapping import fill
from latentdiff.networks.config import UNetConfig
from latentdiff.networks.controlnet import ControlNetConfig, ControlNetwork
from tools.fuzzing import mutations as damage
from tools.fuzzing.readers import Mutant, Reader, digest, used

CONFIG = ControlNetConfig(
    unet=UNetConfig(
        block_out_channels=(8, 16), attention_levels=(True, False), num_heads=(8, 8), layers_per_block=1,
        norm_num_groups=8, cross_attention_dim=16,
    ),
    hint_widths=(4, 8),
)  # fmt: skip


class Control(Reader):
    name = "control"

    def make(self, folder: Path) -> list[Path]:
        tensors = dict(ControlNetwork(CONFIG).state_dict())
        (folder / "net").mkdir()
        save_file(tensors, folder / "net/diffusion_pytorch_model.safetensors")
        (folder / "net/config.json").write_text(json.dumps(CONFIG.to_diffusers()))
        save_file(to_original(tensors, CONFIG), folder / "original.safetensors")
        return [folder / "net", folder / "original.safetensors"]

    def mutate(self, rng: random.Random, folder: Path) -> Mutant:
        number, source, path = self.pick(rng, folder)
        if source.is_file():
            make = damage.bytes_of if rng.random() < 0.3 else _header
            path.write_bytes(make(rng, source.read_bytes()))
            return Mutant(path, "bytes or header", number)
        shutil.copytree(source, path)
        config = path / "config.json"
        config.write_bytes(damage.text_of(rng, damage.value_of(rng, json.loads(config.read_text()))))
        return Mutant(path, "config.json", number)

    def read(self, path: Path) -> Any:
        str(inspect(path))
        control = read_control(path)
        return used(lambda: (digest(control.tensors), str(control.config), _run(control.config, control.tensors)))


def _header(rng: random.Random, data: bytes) -> bytes:
    return damage.header_of(rng, data, lambda header: damage.value_of(rng, header))


def _run(config: ControlNetConfig, tensors: dict[str, torch.Tensor]) -> Any:
    network = empty_control(config)
    fill(network, tensors)
    dtype = next(network.parameters()).dtype
    hint = network.embed_hint(torch.ones(1, 3, 8 * config.downscale, 8 * config.downscale, dtype=dtype))
    x = torch.ones(1, config.unet.in_channels, 8, 8, dtype=dtype)
    found = network.float()(x.float(), 5.0, torch.ones(1, 4, config.unet.cross_attention_dim), hint.float())
    return [tuple(one.shape) for one in found]
