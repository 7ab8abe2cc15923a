"""OpenVINO computes what the plain modules compute."""

from __future__ import annotations

import sys

import pytest
import torch

from latentdiff import Pipeline
from latentdiff.engines import openvino as engine
from latentdiff.engines.openvino import OpenVINODecoder, OpenVINONetwork
from latentdiff.errors import MissingDependencyError, UsageError
from latentdiff.networks.taps import Tap
from tests import peers

pytest.importorskip("openvino")

SHAPES = [(2, 8, 8, 77), (1, 8, 8, 77), (3, 9, 13, 20)]  # batch, height, width, tokens


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LATENTDIFF_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def pipe() -> Pipeline:
    return peers.ours("sd1")


def inputs(batch: int, height: int, width: int, tokens: int, dtype: torch.dtype = torch.float32):
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(batch, 4, height, width, generator=generator)
    return x.to(dtype), torch.randn(batch, tokens, 32, generator=generator).to(dtype)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


@torch.no_grad()
@pytest.mark.parametrize("model", ["sd1", "sd2"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_network_agrees_in_every_shape(model: str, precision: str) -> None:
    pipe = peers.ours(model)
    reference = peers.ours(model).unet
    unet = pipe.to("cpu", precision).unet
    network = OpenVINONetwork(unet)
    for shape in SHAPES:
        x, text = inputs(*shape)
        expected = reference(x, 321.5, text)
        short = x.to(unet.conv_in.weight.dtype), text.to(unet.conv_in.weight.dtype)
        allowed = 1e-5 + 3 * relative(unet(short[0], 321.5, short[1]), expected)  # bf16 rounds, whoever computes
        found = network(short[0], 321.5, unet.project_context(short[1]))
        assert found.dtype == short[0].dtype and relative(found, expected) < allowed
        assert relative(network(short[0], torch.tensor([321.5] * shape[0]), short[1]), expected) < allowed


@torch.no_grad()
def test_decoder_agrees(pipe: Pipeline) -> None:
    decoder = OpenVINODecoder(pipe.vae)
    for size in ((8, 8), (4, 12)):
        latents = torch.randn(1, 4, *size)
        assert relative(decoder(latents), pipe.vae.decode(latents)) < 1e-5
    assert torch.equal(decoder(latents, tile=32), pipe.vae.decode(latents, tile=32))


@torch.no_grad()
def test_each_prompt_has_its_own_keys_and_values(pipe: Pipeline) -> None:
    network = OpenVINONetwork(pipe.unet)
    x, text = inputs(1, 8, 8, 77)
    for scale in (1.0, 3.0):
        context = pipe.unet.project_context(scale * text)
        assert relative(network(x, 9, context), pipe.unet(x, 9, context)) < 1e-5


@torch.no_grad()
def test_conversion_is_kept_between_runs(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    x, text = inputs(*SHAPES[0])
    first = OpenVINONetwork(pipe.unet)(x, 5, text)
    monkeypatch.setattr(engine, "_traced", lambda *_: pytest.fail("converted again"))
    assert torch.equal(OpenVINONetwork(pipe.unet)(x, 5, text), first)
    assert torch.equal(OpenVINONetwork(peers.ours("sd1").unet)(x, 5, text), first)


@torch.no_grad()
def test_an_interrupted_conversion_leaves_nothing(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setenv("LATENTDIFF_CACHE", str(tmp_path))
    x, text = inputs(*SHAPES[0])
    network = OpenVINONetwork(pipe.unet)
    with monkeypatch.context() as patch:
        patch.setattr(engine, "_publish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            network(x, 5, text)
    assert not list((tmp_path / "openvino").iterdir())
    assert relative(network(x, 5, text), pipe.unet(x, 5, text)) < 1e-5


@torch.no_grad()
def test_changed_weights_are_converted_anew(pipe: Pipeline) -> None:
    network = OpenVINONetwork(pipe.unet)
    x, text = inputs(*SHAPES[0])
    before = network(x, 5, text)
    pipe.unet.conv_out.weight.mul_(2)
    assert relative(network(x, 5, text), pipe.unet(x, 5, text)) < 1e-5
    assert relative(network(x, 5, text), before) > 0.1


@torch.no_grad()
def test_taps_are_heeded(pipe: Pipeline) -> None:
    network = OpenVINONetwork(pipe.unet)
    x, text = inputs(*SHAPES[0])
    untapped = network(x, 5, text)
    with Tap(pipe.unet, ["mid_block"], output=lambda name, arguments, output: 0 * output):
        with pytest.warns(UserWarning, match="tap is on the UNet"):
            found = network(x, 5, text)
        assert torch.equal(found, pipe.unet(x, 5, text))
    assert torch.equal(network(x, 5, text), untapped)


def test_gradients_are_refused(pipe: Pipeline) -> None:
    x, text = inputs(*SHAPES[0])
    with pytest.raises(UsageError, match="no gradients"):
        OpenVINONetwork(pipe.unet)(x.requires_grad_(), 5, text)


def test_float16_is_refused(pipe: Pipeline) -> None:
    with pytest.raises(UsageError, match="found fp16"):
        OpenVINONetwork(pipe.unet.half())


def test_missing_openvino_names_the_extra(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    engine.openvino_package.cache_clear()
    with pytest.raises(MissingDependencyError, match=r"latentdiff\[openvino\]"):
        OpenVINONetwork(pipe.unet)
