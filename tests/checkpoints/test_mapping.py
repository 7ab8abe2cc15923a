from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from latentdiff.checkpoints.files import read_tensors
from latentdiff.checkpoints.mapping import empty, fill, prefetch, release
from latentdiff.checkpoints.writing import NAMES_OF_TYPES

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def resident_file_pages() -> int:
    """Bytes of mapped files that are in this process's memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssFile"))


def stored(path: Path, count: int = 8, size: int = 2**20, dtype: torch.dtype = torch.float32) -> Path:
    """A file of `count` tensors of `size` random numbers."""
    generator = torch.Generator().manual_seed(0)
    tensors = {f"{i}.weight": torch.randn(1024, size // 1024, generator=generator).to(dtype) for i in range(count)}
    save_file(tensors, path)
    return path


@pytest.mark.parametrize("dtype", NAMES_OF_TYPES, ids=str)
def test_every_type_is_read_bit_for_bit(tmp_path: Path, dtype: torch.dtype):
    bits = torch.arange(240, dtype=torch.uint8)
    tensor = (bits % 2).bool() if dtype is torch.bool else bits.view(dtype).view(2, -1)
    save_file(
        {"a": torch.zeros(3, dtype=torch.int8), "b": tensor, "none": torch.zeros(0, 4)}, tmp_path / "x.safetensors"
    )
    found = read_tensors(tmp_path / "x.safetensors").tensors
    assert found["b"].dtype is dtype and found["b"].shape == tensor.shape
    assert torch.equal(found["b"].view(torch.uint8).flatten(), tensor.contiguous().view(torch.uint8).flatten())
    assert found["none"].shape == (0, 4)


def test_tensors_that_a_file_does_not_align_are_copied(tmp_path: Path):
    values = torch.randn(5)
    header = json.dumps({"x": {"dtype": "F32", "shape": [5], "data_offsets": [0, 20]}}).encode()
    header += b" " * (1 - len(header) % 2)  # an odd length
    (tmp_path / "odd.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + values.numpy().tobytes())
    found = read_tensors(tmp_path / "odd.safetensors").tensors["x"]
    assert torch.equal(found, values) and found.data_ptr() % 4 == 0


def test_each_tensor_has_a_storage_of_its_own(tmp_path: Path):
    tensors = read_tensors(stored(tmp_path / "x.safetensors", count=2)).tensors
    assert tensors["0.weight"].untyped_storage().nbytes() == tensors["0.weight"].numel() * 4


def test_writing_to_a_tensor_leaves_the_file_alone(tmp_path: Path):
    path = stored(tmp_path / "x.safetensors", count=1)
    before = path.read_bytes()
    read_tensors(path).tensors["0.weight"].zero_()
    assert path.read_bytes() == before


@linux
def test_released_memory_is_free_and_comes_back_as_it_was(tmp_path: Path):
    tensor = read_tensors(stored(tmp_path / "x.safetensors", count=1, size=2**23)).tensors["0.weight"]  # 32 MiB
    prefetch(tensor)
    total = tensor.double().sum()
    full = resident_file_pages()
    release(tensor)
    assert full - resident_file_pages() > 30 * 2**20
    assert tensor.double().sum() == total


def test_other_tensors_are_not_released():
    tensor = torch.randn(2**20)
    copy = tensor.clone()
    release(tensor)
    assert torch.equal(tensor, copy)


@linux
def test_converting_holds_no_second_copy(tmp_path: Path):
    tensors = read_tensors(stored(tmp_path / "x.safetensors")).tensors  # 8 of 4 MiB
    with torch.device("meta"):
        module = nn.Sequential(*(nn.Linear(1024, 1024, bias=False) for _ in range(8))).to(torch.bfloat16)
    before = resident_file_pages()
    fill(module, tensors)
    assert resident_file_pages() - before < 2 * 2**20
    assert all(torch.equal(module[i].weight, tensors[f"{i}.weight"].bfloat16()) for i in range(8))


def test_fill_keeps_types_and_layouts_of_the_module(tmp_path: Path):
    save_file({"weight": torch.randn(4, 3, 3, 3), "bias": torch.randn(4)}, tmp_path / "x.safetensors")
    tensors = read_tensors(tmp_path / "x.safetensors").tensors
    with torch.device("meta"):
        module = nn.Conv2d(3, 4, 3).to(torch.bfloat16, memory_format=torch.channels_last)
    module.bias.requires_grad_(False)
    for _ in range(2):
        fill(module, tensors)
        assert module.weight.is_contiguous(memory_format=torch.channels_last) and module.weight.requires_grad
        assert torch.equal(module.weight, tensors["weight"].bfloat16()) and not module.bias.requires_grad
        empty(module, tensors)
        assert module.weight.is_meta and module.weight.dtype is torch.bfloat16


def test_without_conversion_nothing_is_copied(tmp_path: Path):
    tensors = read_tensors(stored(tmp_path / "x.safetensors", count=1)).tensors
    with torch.device("meta"):
        module = nn.Sequential(nn.Linear(1024, 1024, bias=False))
    fill(module, tensors)
    assert module[0].weight.data_ptr() == tensors["0.weight"].data_ptr()
