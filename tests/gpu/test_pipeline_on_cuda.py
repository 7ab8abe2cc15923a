"""Whole images on a CUDA device: finite in half precision, and those of the CPU in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from latentdiff import Pipeline
from tests import tiny

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SAMPLERS = ["ddim", "ddpm", "euler", "dpmpp-2m"]


@pytest.fixture(scope="module", params=["sd1", "sd2"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    save = {"sd1": tiny.sd1_folder, "sd2": tiny.sd2_folder}[request.param]
    return save(tmp_path_factory.mktemp(request.param))


def made(folder: Path, device: str, precision: str, **options: Any) -> np.ndarray:
    """Two images as (2, H, W, 3) floats in 0 to 255."""
    pipe = Pipeline.load(folder, device=device, precision=precision)
    defaults = {"steps": 10, "guidance_scale": 5.0, "seed": 3, "num_images": 2, "height": 64, "width": 64}
    return np.stack([np.asarray(image, np.float32) for image in pipe("a red cat", **{**defaults, **options})])


@pytest.fixture
def exact_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuDNN rounds float32 convolutions to TF32 unless told otherwise."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)


@pytest.mark.usefixtures("exact_float32")
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_same_image_as_on_the_cpu(folder: Path, sampler: str) -> None:
    """Noise is drawn on the CPU, so stochastic samplers agree as well."""
    on_cpu = made(folder, "cpu", "fp32", sampler=sampler)
    on_cuda = made(folder, "cuda", "fp32", sampler=sampler)
    assert on_cpu.std() > 5, "a uniform image would agree with anything"
    assert np.abs(on_cpu - on_cuda).max() <= 1


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision_is_finite_and_close(folder: Path, precision: str) -> None:
    half = made(folder, "cuda", precision)
    full = made(folder, "cuda", "fp32")
    assert np.isfinite(half).all()
    assert np.abs(half - full).mean() < (3 if precision == "fp16" else 12)


@pytest.mark.usefixtures("exact_float32")
def test_image_of_a_batch_is_the_image_alone(folder: Path) -> None:
    batch = made(folder, "cuda", "fp32", sampler="ddpm", num_images=8, seed=0)
    alone = made(folder, "cuda", "fp32", sampler="ddpm", num_images=1, seed=5)
    assert np.abs(batch[5] - alone[0]).max() <= 1


def test_auto_picks_cuda(folder: Path) -> None:
    pipe = Pipeline.load(folder)
    assert next(pipe.unet.parameters()).device.type == "cuda"
