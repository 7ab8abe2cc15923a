"""Damaged IP-Adapters, image encoders and T2I-Adapters: files of every layout, and folders with their configuration."""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from latentdiff.checkpoints.image_encoder import empty_image_encoder, read_image_encoder
from latentdiff.checkpoints.inspection import inspect
from latentdiff.checkpoints.ip_adapter import empty_ip_adapter, read_ip_adapter
from latentdiff.checkpoints.mapping import fill
from latentdiff.checkpoints.t2i_adapter import empty_t2i_adapter, read_t2i_adapter, t2i_map
from latentdiff.errors import CheckpointError
from latentdiff.networks.image_encoder import ImageEncoder, ImageEncoderConfig
from latentdiff.networks.ip_adapter import IPAdapterConfig, IPAdapterNetwork
from latentdiff.networks.t2i_adapter import T2IAdapterConfig, T2IAdapterNetwork
from tools.fuzzing import mutations as damage
from tools.fuzzing.readers import Mutant, Reader, digest, used

_SAME: dict[str, Any] = {"width": 8, "layers": {"1": 8, "3": 16}}
PLAIN = IPAdapterConfig(kind="plain", image_width=6, tokens=2, **_SAME)
PLUS = IPAdapterConfig(kind="plus", image_width=10, tokens=3, inner=12, depth=1, heads=1, feed_forward=16, **_SAME)
ENCODER = ImageEncoderConfig(
    hidden_size=8, intermediate_size=8, projection_dim=6, num_hidden_layers=2, num_attention_heads=2, image_size=8,
    patch_size=4,
)  # fmt: skip
T2I = T2IAdapterConfig(light=False, in_channels=1, unshuffle=8, channels=(8, 8, 12, 12), blocks=1)


class IPAdapters(Reader):
    name = "ip-adapter"

    def make(self, folder: Path) -> list[Path]:
        plain, plus = (dict(IPAdapterNetwork(config).state_dict()) for config in (PLAIN, PLUS))
        save_file(plain, folder / "plain.safetensors")
        nested: dict[str, dict[str, Tensor]] = {}
        for name, tensor in plus.items():
            part, _, rest = name.partition(".")
            nested.setdefault(part, {})[rest] = tensor
        torch.save(nested, folder / "plus.bin")
        return [folder / "plain.safetensors", folder / "plus.bin"]

    def mutate(self, rng: random.Random, folder: Path) -> Mutant:
        number, source, path = self.pick(rng, folder)
        is_header = source.suffix == ".safetensors" and rng.random() < 0.7
        path.write_bytes((_header if is_header else damage.bytes_of)(rng, source.read_bytes()))
        return Mutant(path, "header" if is_header else "bytes", number)

    def read(self, path: Path) -> Any:
        str(inspect(path))
        weights = read_ip_adapter(path)

        def run() -> Any:
            network = _filled(empty_ip_adapter(weights.config), weights.tensors)
            config = weights.config
            shape = (2, config.image_width) if config.kind == "plain" else (2, 5, config.image_width)
            return [*network.tokens(torch.ones(shape)).shape]

        return used(lambda: (digest(weights.tensors), str(weights.config), run()))


class _Folders(Reader):
    """Folders of `config.json` and one file of weights, which is damaged in one of the two."""

    def mutate(self, rng: random.Random, folder: Path) -> Mutant:
        number, source, path = self.pick(rng, folder)
        if source.is_file():
            path.write_bytes((_header if rng.random() < 0.7 else damage.bytes_of)(rng, source.read_bytes()))
            return Mutant(path, "bytes or header", number)
        shutil.copytree(source, path)
        config = path / "config.json"
        if rng.random() < 0.6:
            config.write_bytes(damage.text_of(rng, damage.value_of(rng, json.loads(config.read_text()))))
            return Mutant(path, "config.json", number)
        weights = next(path.glob("*.safetensors"))
        weights.write_bytes(_header(rng, weights.read_bytes()))
        return Mutant(path, "header", number)


class ImageEncoders(_Folders):
    name = "image-enc"

    def make(self, folder: Path) -> list[Path]:
        (folder / "encoder").mkdir()
        save_file(dict(ImageEncoder(ENCODER).state_dict()), folder / "encoder/model.safetensors")
        settings = {"model_type": "clip_vision_model", **asdict(ENCODER)}
        (folder / "encoder/config.json").write_text(json.dumps(settings))
        return [folder / "encoder"]

    def read(self, path: Path) -> Any:
        str(inspect(path))
        weights = read_image_encoder(path)

        def run() -> Any:
            network, side = _filled(empty_image_encoder(weights.config), weights.tensors), weights.config.image_size
            return [*network(torch.ones(1, 3, side, side)).shape]

        return used(lambda: (digest(weights.tensors), str(weights.config), run()))


class T2IAdapters(_Folders):
    name = "t2i-adapter"

    def make(self, folder: Path) -> list[Path]:
        tensors, table = dict(T2IAdapterNetwork(T2I).state_dict()), t2i_map(T2I)
        (folder / "net").mkdir()
        save_file(tensors, folder / "net/diffusion_pytorch_model.safetensors")
        settings = {
            "_class_name": "T2IAdapter", "adapter_type": "full_adapter", "channels": T2I.channels, "downscale_factor": 8,
            "in_channels": 1, "num_res_blocks": 1,
        }  # fmt: skip
        (folder / "net/config.json").write_text(json.dumps(settings))
        save_file({str(table.to_theirs(name)): tensor for name, tensor in tensors.items()}, folder / "old.safetensors")
        return [folder / "net", folder / "old.safetensors"]

    def read(self, path: Path) -> Any:
        str(inspect(path))
        weights = read_t2i_adapter(path)
        if weights is None:
            raise CheckpointError(f"{path} is something else")

        def run() -> Any:
            network = _filled(empty_t2i_adapter(weights.config), weights.tensors)
            return [tuple(one.shape) for one in network(torch.ones(1, 3, 72, 64))]

        return used(lambda: (digest(weights.tensors), str(weights.config), run()))


def _header(rng: random.Random, data: bytes) -> bytes:
    return damage.header_of(rng, data, lambda header: damage.value_of(rng, header))


def _filled(network: Any, tensors: dict[str, Tensor]) -> Any:
    assert isinstance(network, nn.Module)
    fill(network, tensors)
    return network.float()
