from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from latentdiff.checkpoints.files import read_tensors
from latentdiff.model.memory.parts import Part
from latentdiff.networks.device import in_float32


@pytest.fixture
def path(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    save_file(
        {"0.weight": torch.randn(8, 4), "0.bias": torch.randn(8), "1.weight": torch.randn(3, 8)},
        tmp_path / "x.safetensors",
    )
    return tmp_path / "x.safetensors"


@pytest.fixture
def part(path: Path) -> Part:
    with torch.device("meta"):
        module = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3, bias=False))
    return Part(module, read_tensors(path).tensors)


def test_weights_are_read_at_first_use(part: Part, path: Path):
    assert not part.is_ready and part.module[0].weight.is_meta
    network = part.ready()
    assert part.is_ready and network is part.module and not network.training
    assert all(torch.equal(value, network.state_dict()[name]) for name, value in load_file(path).items())


def test_given_back_weights_come_back(part: Part):
    x = torch.randn(2, 4)
    first = part.ready()(x)
    assert part.give_back() and not part.is_ready and part.module[0].weight.is_meta
    assert part.give_back()  # nothing left to give
    assert torch.equal(part.ready()(x), first)


@pytest.mark.parametrize("change", ["in place", "data", "replaced"])
def test_changed_weights_stay(part: Part, change: str):
    layer = part.ready()[0]
    with torch.no_grad():
        if change == "in place":
            layer.weight += 1
        elif change == "data":
            layer.weight.data = layer.weight.data + 1
        else:
            layer.weight = nn.Parameter(layer.weight + 1)
    changed = layer.weight.clone()
    assert not part.give_back() and part.is_ready
    assert torch.equal(part.ready()[0].weight, changed)
    part.to("cpu", torch.float64)
    assert torch.equal(part.ready()[0].weight, changed.double())


def test_weights_without_a_file_stay():
    part = Part(nn.Linear(2, 2))
    assert part.is_ready and not part.give_back()
    part.to("cpu", torch.bfloat16)
    assert part.ready().weight.dtype is torch.bfloat16


def test_another_format_is_read_from_the_file(part: Part, path: Path):
    part.to("cpu", torch.bfloat16)
    assert part.ready()[0].weight.dtype is torch.bfloat16
    part.to("cpu", torch.float32)
    assert torch.equal(part.ready()[0].weight, load_file(path)["0.weight"])  # not what bfloat16 left of it


def test_computing_once_in_float32_does_no_harm(part: Part):
    part.to("cpu", torch.bfloat16)
    before = part.ready()[0].weight.clone()
    with in_float32(part.module):
        assert part.module[0].weight.dtype is torch.float32
    part.give_back()
    assert torch.equal(part.ready()[0].weight, before)


def test_weights_read_without_gradients_can_be_trained(part: Part):
    with torch.inference_mode():
        part.ready()
    part.module(torch.randn(2, 4)).sum().backward()
    assert part.module[0].weight.grad is not None
