"""Compiled blocks and recorded steps compute what the plain modules compute."""

from __future__ import annotations

import pytest
import torch

from latentdiff import Pipeline
from latentdiff.engines import compiled
from latentdiff.engines import cuda_graphs as graphs
from latentdiff.engines.compiled import CompiledDecoder, CompiledNetwork, check_compiler
from latentdiff.engines.cuda_graphs import GraphedFunction
from latentdiff.errors import MissingDependencyError, UsageError
from latentdiff.networks.taps import Tap
from tests import peers


@pytest.fixture
def pipe() -> Pipeline:
    return peers.ours("sd1")


def inputs(batch: int, height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    return torch.randn(batch, 4, height, width, generator=generator), torch.randn(batch, 77, 32, generator=generator)


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything but the compiler."""
    monkeypatch.setattr(compiled, "_COMPILED", compiled._FUNCTIONS)
    monkeypatch.setattr(compiled, "check_compiler", lambda device: None)


@torch.no_grad()
@pytest.mark.slow
def test_compiled_blocks_agree(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        check_compiler("cpu")
    except MissingDependencyError as error:
        pytest.skip(str(error))
    monkeypatch.setenv("LATENTDIFF_CACHE", str(tmp_path))
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    pipe = peers.ours("sd1")
    network, decoder = CompiledNetwork(pipe.unet), CompiledDecoder(pipe.vae)
    for shape in ((2, 8, 8), (1, 9, 13)):
        x, text = inputs(*shape)
        torch.testing.assert_close(network(x, 9.5, text), pipe.unet(x, 9.5, text), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(decoder(x), pipe.vae.decode(x), rtol=1e-4, atol=1e-4)
    assert any((tmp_path / "compile").iterdir())
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")


@torch.no_grad()
@pytest.mark.usefixtures("eager")
def test_every_block_goes_through_its_function(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    counted = {
        kind: lambda block, *arguments, f=function, **named: calls.append(block) or f(block, *arguments, **named)
        for kind, function in compiled._FUNCTIONS.items()
    }
    monkeypatch.setattr(compiled, "_COMPILED", counted)
    x, text = inputs(2, 8, 8)
    plain = pipe.unet(x, 9.5, text)
    network = CompiledNetwork(pipe.unet)
    for _ in range(2):
        found = network(x, 9.5, pipe.unet.project_context(text))
        torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-5)
        blocks = [module for module in pipe.unet.modules() if type(module) in compiled._FUNCTIONS]
        assert len(calls) == len(blocks) == 44 and set(calls) == set(blocks)
        calls.clear()
    assert torch.equal(pipe.unet(x, 9.5, text), plain) and not calls


@torch.no_grad()
@pytest.mark.usefixtures("eager")
def test_taps_are_heeded(pipe: Pipeline) -> None:
    network, (x, text) = CompiledNetwork(pipe.unet), inputs(2, 8, 8)
    with Tap(pipe.unet, ["mid_block"], output=lambda name, arguments, output: 0 * output):
        with pytest.warns(UserWarning, match="tap is on the UNet"):
            assert torch.equal(network(x, 5, text), pipe.unet(x, 5, text))


@pytest.mark.usefixtures("eager")
def test_gradients_are_refused(pipe: Pipeline) -> None:
    x, text = inputs(1, 8, 8)
    with pytest.raises(UsageError, match="no gradients"):
        CompiledNetwork(pipe.unet)(x.requires_grad_(), 5, text)


def test_missing_compiler_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(compiled.shutil, "which", lambda name: None)
    with pytest.raises(MissingDependencyError, match="needs a C\\+\\+ compiler"):
        check_compiler("cpu")


class FakeGraph:
    """Records a function as a CUDA graph does: by the memory of its inputs, and never looking at other tensors
    again."""

    def __init__(self, function, tensors) -> None:
        self.places = [each.clone() for each in tensors]
        self.function = function

    def __call__(self, tensors) -> torch.Tensor:
        for place, value in zip(self.places, tensors, strict=True):
            place.copy_(value)
        return self.function(*self.places)


def test_one_recording_for_each_shape_and_state(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    monkeypatch.setattr(graphs, "_Graph", lambda *arguments: made.append(1) or FakeGraph(*arguments))
    monkeypatch.setattr(graphs, "is_recordable", lambda device: True)
    graphed = GraphedFunction(lambda x, y: x + 2 * y)
    a, b = torch.randn(3), torch.randn(3)
    assert torch.equal(graphed("state", a, b), a + 2 * b) and torch.equal(graphed("state", b, a), b + 2 * a)
    assert len(made) == 1
    assert graphed("state", a[:2], b[:2]).shape == (2,) and len(made) == 2
    graphed("other", a, b)
    graphed("state", a.double(), b.double())
    assert len(made) == 4
    for size in range(4, 4 + graphs.MAX_GRAPHS):
        graphed("state", torch.ones(size), torch.ones(size))
    assert len(graphed._graphs) == graphs.MAX_GRAPHS
