"""What makes it fast or small, on networks of SDXL's shape: other depths, pooled text and sizes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from latentdiff import Pipeline
from latentdiff.engines import compiled, int8
from latentdiff.engines.compiled import CompiledNetwork
from latentdiff.engines.deepcache import CacheSettings, DeepCache
from latentdiff.engines.int8 import Int8Network
from latentdiff.errors import UsageError
from latentdiff.networks.conditioning import Conditioning
from latentdiff.networks.layers import ProjectedContext
from tests import peers
from tests.tasks.images import apart

PROMPT = "a photo of the cat"
OPTIONS = {"steps": 4, "seed": 1, "progress": False}
BRANCHES = 9  # decoder blocks: three levels of three


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return peers.ours("xl")


def inputs(
    pipe: Pipeline, size: tuple[int, int] = (8, 8), told: tuple[int, int] = (64, 64)
) -> tuple[torch.Tensor, ProjectedContext]:
    """Latents and text, as engines take them."""
    x = torch.randn(1, 4, *size, generator=torch.Generator().manual_seed(4))
    sizes = pipe.told(*told).positive
    return x, Conditioning.of(pipe.unet, pipe.encode([PROMPT]), sizes=sizes).projected


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


@torch.no_grad()
@pytest.mark.parametrize("branch", range(BRANCHES))
@pytest.mark.parametrize("size", [(8, 8), (10, 7)])
def test_a_cached_step_is_exact_where_nothing_changed(pipe: Pipeline, branch: int, size: tuple[int, int]) -> None:
    x, context = inputs(pipe, size)
    calls = []

    def network(*arguments):
        calls.append(arguments)
        return pipe.unet(*arguments)

    cached = DeepCache(network, pipe.unet, CacheSettings(2, branch), 4)
    cached(x, 500.0, context)
    again = cached(x, 500.000001, context)  # another step to the cache, the same to float32
    assert len(calls) == 1
    torch.testing.assert_close(again, pipe.unet(x, 500.0, context), rtol=1e-5, atol=1e-5)


def test_cached_images_are_near_and_there_is_no_further_branch(pipe: Pipeline) -> None:
    plain = pipe(PROMPT, **OPTIONS)[0]
    cached = pipe(PROMPT, cache_interval=2, cache_branch=4, **OPTIONS)[0]
    assert 0 < apart(cached, plain) and np.abs(np.asarray(cached).astype(int) - np.asarray(plain)).mean() < 10
    with pytest.raises(UsageError, match=f"cache branch of 0 to {BRANCHES - 1} for this U-Net, found {BRANCHES}"):
        pipe(PROMPT, cache_interval=2, cache_branch=BRANCHES, **OPTIONS)


@torch.no_grad()
def test_every_block_is_compiled_and_computes_the_same(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    counted = {
        kind: lambda block, *arguments, f=function, **named: calls.append(block) or f(block, *arguments, **named)
        for kind, function in compiled._FUNCTIONS.items()
    }
    monkeypatch.setattr(compiled, "_COMPILED", counted)
    monkeypatch.setattr(compiled, "check_compiler", lambda device: None)
    x, context = inputs(pipe)
    found = CompiledNetwork(pipe.unet)(x, 9.5, context)
    torch.testing.assert_close(found, pipe.unet(x, 9.5, context), rtol=1e-4, atol=1e-5)
    blocks = [module for module in pipe.unet.modules() if type(module) in compiled._FUNCTIONS]
    assert blocks and set(calls) == set(blocks) and len(calls) == len(blocks)


@torch.no_grad()
def test_8_bits(pipe: Pipeline) -> None:
    x, context = inputs(pipe)
    if not int8.int8_is_possible():
        with pytest.raises(UsageError, match="needs a CPU with VNNI") as error:
            Int8Network(pipe.unet)
        assert "\n" not in str(error.value)
        return
    t = 500.0
    assert relative(Int8Network(pipe.unet)(x, t, context), pipe.unet(x, t, context)) < 0.1


@torch.no_grad()
def test_8_bit_layers_are_those_of_the_other_families(pipe: Pipeline) -> None:
    """What is rounded are kinds of layers; all of SDXL's are among those of SD 2.x."""
    kinds = [{type(module).__name__ for module in unet.modules()} for unet in (pipe.unet, peers.ours("sd2").unet)]
    assert kinds[0] == kinds[1]


@torch.no_grad()
def test_tiles_are_those_of_the_whole_image_nearly(pipe: Pipeline) -> None:
    latents = torch.randn(1, 4, 24, 24, generator=torch.Generator().manual_seed(2))
    whole, tiled = pipe.vae.decode(latents), pipe.vae.decode(latents, tile=40)
    assert not torch.equal(whole, tiled) and relative(tiled, whole) < 0.5


def test_low_memory_draws_larger_images_in_tiles(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    low = Pipeline.load(peers.folder("xl"), device="cpu", precision="fp32", low_memory=True)
    decode = type(low.vae).decode

    def spy(self, latents, *, tile=None):
        seen.append(tile is not None)
        return decode(self, latents, tile=tile)

    monkeypatch.setattr(type(low.vae), "decode", spy)
    (image,) = low(PROMPT, width=128, height=96, **OPTIONS)
    (plain,) = pipe(PROMPT, width=128, height=96, **OPTIONS)
    assert seen == [True, False] and image.size == plain.size == (128, 96)
    assert np.abs(np.asarray(image).astype(int) - np.asarray(plain)).mean() < 20


@torch.no_grad()
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_openvino(pipe: Pipeline, precision: str, monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    pytest.importorskip("openvino")
    from latentdiff.engines.openvino import OpenVINONetwork

    monkeypatch.setenv("LATENTDIFF_CACHE", str(tmp_path))
    own = peers.ours("xl").to("cpu", precision)
    network = OpenVINONetwork(own.unet)
    for size in ((8, 8), (9, 13)):
        x, context = inputs(pipe, size)
        expected = pipe.unet(x, 321.5, context)
        short = x.to(own.unet.conv_in.weight.dtype), inputs(own, size)[1]
        allowed = 1e-5 + 3 * relative(own.unet(short[0], 321.5, short[1]), expected)
        assert relative(network(short[0], 321.5, short[1]), expected) < allowed
    other = inputs(own, size, told=(500, 700))[1]
    assert relative(network(short[0], 321.5, other), network(short[0], 321.5, short[1])) > 1e-6
