from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from latentdiff.errors import LatentDiffError, NotFiniteError, UsageError
from latentdiff.networks import device as devices
from latentdiff.networks.device import (
    FORMATS,
    PrecisionWarning,
    explained_out_of_memory,
    finite_or_float32,
    in_float32,
    is_out_of_memory,
    pick_device,
    pick_precision,
    precision_of,
)
from latentdiff.pipeline import Pipeline
from tests import peers

CPU, CUDA, MPS = torch.device("cpu"), torch.device("cuda"), torch.device("mps")
LARGE, SMALL = 860_000_000, 10_000_000


def only(monkeypatch, *kinds):
    monkeypatch.setattr(devices, "_is_available", lambda kind: kind in kinds)


def test_auto_takes_the_fastest_there_is(monkeypatch):
    only(monkeypatch, "cpu", "mps", "cuda")
    assert pick_device() == CUDA
    only(monkeypatch, "cpu", "mps")
    assert pick_device("auto") == MPS
    only(monkeypatch, "cpu")
    assert pick_device("auto") == CPU


def test_named_devices(monkeypatch):
    only(monkeypatch, "cpu", "cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device("cpu") == CPU
    assert pick_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(UsageError, match="found 2 CUDA devices, no cuda:2"):
        pick_device("cuda:2")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gpu", "expected the device auto"),
        ("", "expected the device"),
        ("cuda", "no cuda device"),
        ("mps", "no mps"),
        ("xla", "no xla"),
    ],
)
def test_devices_that_are_not_there(monkeypatch, name, message):
    only(monkeypatch, "cpu")
    with pytest.raises(UsageError, match=message):
        pick_device(name)


@pytest.mark.parametrize(
    ("has_bf16", "device", "size", "expected"),
    [
        (True, CPU, LARGE, "bf16"),
        (True, CPU, SMALL, "fp32"),
        (False, CPU, LARGE, "fp32"),
        (True, CUDA, SMALL, "bf16"),
        (False, CUDA, LARGE, "fp16"),
        (False, MPS, LARGE, "fp16"),
    ],
)
def test_auto_precision(monkeypatch, has_bf16, device, size, expected):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_bf16, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: has_bf16)
    assert pick_precision("auto", device, size).name == expected


def test_cpu_probe_is_optional(monkeypatch):
    for probe in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, probe, lambda: False, raising=False)
    assert not devices.computes_in_bf16("cpu")
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert devices.computes_in_bf16("cpu")
    monkeypatch.delattr(torch.cpu, "_is_amx_tile_supported")
    monkeypatch.delattr(torch.cpu, "_is_avx512_bf16_supported")
    assert not devices.computes_in_bf16("cpu")


def test_named_precisions():
    assert pick_precision("fp16", CPU, SMALL) is FORMATS["fp16"]
    assert FORMATS["fp16"].vae == torch.float32  # the VAE of SD overflows float16
    assert precision_of(nn.Linear(1, 1).bfloat16()).name == "bf16"
    with pytest.raises(UsageError, match="auto, fp32, bf16, fp16, int8, found 'int4'"):
        pick_precision("int4", CPU, SMALL)
    assert pick_precision("int8", CPU, SMALL).name == "int8"
    with pytest.raises(UsageError, match="computes on the CPU, found cuda"):
        pick_precision("int8", torch.device("cuda"), SMALL)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_in_float32_restores_every_bit(dtype):
    module = nn.Linear(50, 50).to(dtype)
    before = module.weight.clone()
    with pytest.raises(KeyError), in_float32(module):
        assert module.weight.dtype == torch.float32
        raise KeyError
    assert module.weight.dtype == dtype and torch.equal(module.weight, before)


def test_finite_result_is_computed_once():
    seen = []
    result = finite_or_float32("it", nn.Linear(1, 1).half(), lambda dtype: seen.append(dtype) or torch.ones(2))
    assert seen == [torch.float16] and result.tolist() == [1, 1]


def test_overflow_is_computed_again_with_a_warning():
    module = nn.Linear(1, 1, bias=False).half()
    nn.init.constant_(module.weight, 300.0)
    with pytest.warns(PrecisionWarning, match="the toy overflows float16; computed again in float32"):
        result = finite_or_float32("the toy", module, lambda dtype: module(torch.full((1, 1), 300.0, dtype=dtype)))
    assert result.item() == 90_000


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.filterwarnings("ignore::latentdiff.networks.device.PrecisionWarning")
def test_nan_is_an_error(dtype):
    with pytest.raises(NotFiniteError, match="the toy gives NaN or infinity at step 3 in float32"):
        finite_or_float32("the toy", nn.Linear(1, 1).to(dtype), lambda _: torch.tensor(float("nan")), where=lambda: "at step 3")


def test_a_weight_that_is_nan_is_named(tmp_path):
    """In a file, through the pipeline: the message names part and weight, and nothing is drawn."""
    shutil.copytree(peers.folder("sd1"), tmp_path / "damaged")
    file = tmp_path / "damaged/unet/diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["mid_block.resnets.0.conv1.weight"][3, 2, 1, 1] = torch.nan
    save_file(tensors, file)
    pipe = Pipeline.load(tmp_path / "damaged", device="cpu", precision="fp32")
    with pytest.raises(NotFiniteError, match=r"the U-Net .* its weight mid_block.resnets.0.conv1.weight holds them"):
        pipe("a cat", steps=1, progress=False)


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("x"), MemoryError(), RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"),
     RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes")],
)  # fmt: skip
def test_out_of_memory_is_recognised_and_explained(error):
    assert is_out_of_memory(error)
    with pytest.raises(LatentDiffError, match="not enough memory"), explained_out_of_memory():
        raise error


def test_other_errors_are_not_out_of_memory():
    assert not is_out_of_memory(ValueError("out of memory"))
    with pytest.raises(RuntimeError, match="shapes"), explained_out_of_memory():
        raise RuntimeError("shapes")
