"""OpenVINO in 8 bits: near the exact U-Net, calibrated once."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from latentdiff import Pipeline
from latentdiff.engines import openvino_int8 as engine
from latentdiff.engines.int8 import is_outer
from latentdiff.engines.openvino_int8 import OpenVINOInt8Network
from latentdiff.errors import MissingDependencyError
from latentdiff.networks.taps import Tap
from tests import peers

pytest.importorskip("openvino")
pytest.importorskip("nncf")

PROMPT = "a red circle left of a blue square"


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LATENTDIFF_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def pipe() -> Pipeline:
    return Pipeline.load(device="cpu", precision="int8", backend="openvino")


def inputs(pipe: Pipeline, higher: int = 0, wider: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents of the size of the training, which the ranges of all tensors were taken from, or of a larger one."""
    generator, side = torch.Generator().manual_seed(2), pipe.unet.config.sample_size
    x = torch.randn(2, pipe.unet.config.in_channels, side + higher, side + wider, generator=generator)
    return x.bfloat16(), pipe.encode([PROMPT, ""]).bfloat16()


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


@torch.no_grad()
def test_near_the_exact_network_and_equal_at_the_ends(pipe: Pipeline) -> None:
    x, text = inputs(pipe)
    for t in (899.0, 500.0):
        error = relative(pipe.network(x, t, text), pipe.unet(x, t, text))
        assert 0.005 < error < 0.08  # and not 0, as it would be if nothing were rounded
    for t in (950.0, 50.0):
        assert is_outer(t) and torch.equal(pipe.network(x, t, text), pipe.unet(x, t, text))
    x, text = inputs(pipe, 1, 6)  # another shape from the same file
    assert relative(pipe.network(x, 500.0, text), pipe.unet(x, 500.0, text)) < 0.08


def test_image_is_like_the_exact_one(pipe: Pipeline) -> None:
    options = {"steps": 12, "seed": 5, "progress": False}
    exact, near = (
        np.asarray(made(PROMPT, **options)[0], float) for made in (Pipeline.load(device="cpu", precision="fp32"), pipe)
    )
    assert 10 * np.log10(255**2 / np.square(exact - near).mean()) > 25


@torch.no_grad()
def test_calibration_is_kept_between_runs(pipe: Pipeline) -> None:
    x, text = inputs(pipe)
    first = pipe.network(x, 500.0, text)
    again = OpenVINOInt8Network(pipe.unet, lambda: pytest.fail("calibrated again"))
    assert torch.equal(again(x, 500.0, text), first)


@torch.no_grad()
def test_nothing_is_printed_for_programs_to_stumble_on(tmp_path, monkeypatch: pytest.MonkeyPatch, capfd) -> None:
    monkeypatch.setenv("LATENTDIFF_CACHE", str(tmp_path))
    pipe = peers.ours("sd2").use_backend("openvino").to("cpu", "int8")
    x = torch.randn(2, 4, 8, 8).bfloat16()
    text = pipe.encode([PROMPT, ""]).bfloat16()
    exact = pipe.unet(x, 500.0, text)
    assert relative(pipe.network(x, 500.0, text), exact) < 0.1
    assert capfd.readouterr().out == ""
    assert [path.name[:9] for path in (tmp_path / "openvino").iterdir()] == ["unet-int8"]


def test_no_use_is_reported_to_the_maker() -> None:
    program = (
        "import sys; from latentdiff.engines.openvino_int8 import _nncf, openvino_package; openvino_package(), _nncf()"
    )
    program += "; assert 'openvino_telemetry' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


@torch.no_grad()
def test_taps_are_heeded(pipe: Pipeline) -> None:
    x, text = inputs(pipe)
    with Tap(pipe.unet, ["mid_block"], output=lambda name, arguments, output: 0 * output):
        with pytest.warns(UserWarning, match="tap is on the UNet"):
            found = pipe.network(x, 500.0, text)
        assert torch.equal(found, pipe.unet(x, 500.0, text))


def test_recipe_says_both(pipe: Pipeline) -> None:
    recipe = pipe.recipe(prompt="", seed=0, steps=1, sampler="ddim", guidance_scale=1.0, width=8, height=8)
    assert (recipe.precision, recipe.backend) == ("int8", "openvino")


def test_missing_nncf_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nncf", None)
    engine._nncf.cache_clear()
    with pytest.raises(MissingDependencyError, match=r"latentdiff\[openvino\]"):
        OpenVINOInt8Network(peers.ours("sd1").unet, list)
