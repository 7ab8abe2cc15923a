from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from latentdiff.engines.fast_forms import use_fast_forms
from latentdiff.model.memory.estimate import (
    _SLACK,
    Weights,
    Workload,
    advice,
    decoding_bytes,
    denoising_bytes,
    needed,
    weight_bytes,
)
from latentdiff.model.memory.parts import trim
from latentdiff.networks.attention import use_attention_backend
from latentdiff.networks.config import UNetConfig, VAEConfig
from latentdiff.networks.unet import UNet
from latentdiff.networks.vae import VAE

WIDTHS = (64, 128, 128, 128)
UNET = UNetConfig.from_diffusers(
    {
        "sample_size": 64,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": WIDTHS,
        "layers_per_block": 2,
        "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
        "attention_head_dim": 4,
        "cross_attention_dim": 64,
    }
)
VAE_CONFIG = VAEConfig.from_diffusers(
    {
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": 4,
        "block_out_channels": WIDTHS,
        "layers_per_block": 2,
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "sample_size": 384,
    }
)
SIZE = 48  # of the latents


def workload(size: int = SIZE, *, rows: int = 2, item: int = 4, **options: object) -> Workload:
    return Workload(UNET, VAE_CONFIG, Weights(10**8, 10**9, 10**8, 10**7), rows, size, size, item, item, **options)


def status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))


def measured_peak(compute: Callable[[], object]) -> int:
    """Bytes of resident memory that `compute` takes at its peak, in this process."""
    gc.collect()
    trim()
    Path("/proc/self/clear_refs").write_text("5")  # forgets the old peak
    before = status("VmRSS")
    compute()
    return status("VmHWM") - before


def random(network: nn.Module, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    network.to(dtype).eval().requires_grad_(False)
    use_fast_forms(network)
    return network


def within(estimate: int, measured: int) -> bool:
    """Within a quarter, beside what the allocator happens to keep: that depends on what the process did before."""
    return abs(estimate - measured) <= 0.25 * measured + _SLACK


linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@linux
@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_denoising_takes_what_is_estimated(dtype: torch.dtype):
    unet = random(UNet(UNET), dtype)
    size, rows = 64, 4
    x, context = torch.randn(rows, 4, size, size).to(dtype), torch.randn(rows, 77, 64).to(dtype)
    unet(x[..., :8, :8], 10.0, context)
    measured = measured_peak(lambda: unet(x, 10.0, context))
    assert within(denoising_bytes(workload(size, rows=rows, item=dtype.itemsize)), measured), measured


@linux
@torch.no_grad()
def test_plain_attention_takes_what_is_estimated():
    unet = random(UNet(UNET), torch.float32)
    x, context = torch.randn(2, 4, 48, 48), torch.randn(2, 77, 64)
    with use_attention_backend("plain"):
        unet(x[..., :8, :8], 10.0, context)
        measured = measured_peak(lambda: unet(x, 10.0, context))
    assert within(denoising_bytes(workload(48, quadratic=True)), measured), measured


@linux
@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_decoding_takes_what_is_estimated(dtype: torch.dtype):
    vae = random(VAE(VAE_CONFIG), dtype)
    z = torch.randn(1, 4, SIZE, SIZE).to(dtype)
    vae.decode(z[..., :8, :8])
    measured = measured_peak(lambda: vae.decode(z))
    assert within(decoding_bytes(workload(item=dtype.itemsize)), measured), measured


def test_weights_are_counted_in_their_formats():
    with torch.device("meta"):
        unet = UNet(UNET)
    assert (
        weight_bytes(unet) == 4 * sum(p.numel() for p in unet.parameters()) == 2 * weight_bytes(unet.to(torch.bfloat16))
    )


def test_activations_grow_as_the_mathematics_says():
    denoising, decoding = (lambda j, f=f: f(j) - f(workload(0)) for f in (denoising_bytes, decoding_bytes))
    assert denoising(workload(rows=8)) == 4 * denoising(workload(rows=2))
    assert denoising(workload(128)) == 4 * denoising(workload(64))
    assert denoising(workload(128, quadratic=True)) > 10 * denoising(workload(64, quadratic=True))
    assert decoding(workload(128)) == 4 * decoding(workload(64))


def test_tiles_bound_the_decoder():
    large, low = workload(256), workload(256, low_memory=True)
    assert low.is_tiled and not workload(SIZE, low_memory=True).is_tiled and not large.is_tiled
    assert decoding_bytes(low) < decoding_bytes(large) / 4
    assert decoding_bytes(workload(low_memory=True)) == decoding_bytes(workload())


def test_windows_and_tiles_of_ones_own_bound_both_networks():
    whole, part = workload(256), workload(256, window=64, tile=8 * SIZE)
    assert denoising_bytes(part) == denoising_bytes(workload(64)) < denoising_bytes(whole) / 4
    assert decoding_bytes(part) == decoding_bytes(workload(256, low_memory=True))


def test_one_part_at_a_time_takes_less():
    at_once, staged, streamed = (
        needed(workload(), at_once=True),
        needed(workload(), at_once=False),
        needed(workload(low_memory=True), at_once=False),
    )
    assert at_once > 1.2e9 > staged > 1e9 > streamed


def test_the_advice_names_every_option_that_helps_alone():
    large = workload(64, rows=32)
    assert advice(large, int(1.3e9)) == "--batch-size 1 or --precision bf16 or --low-memory"
    assert advice(large, 10**9) == "--precision bf16 or --low-memory"
    assert advice(workload(), int(5e8)) == "--low-memory"
    assert advice(workload(128, quadratic=True), int(3.5e9)) == "--attention sdpa"
    assert advice(large, 10**6) == ""
