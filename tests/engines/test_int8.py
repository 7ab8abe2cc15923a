"""The U-Net in 8 bits: near the exact one, and nothing but an addition to it."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

from latentdiff import Pipeline
from latentdiff.engines import int8
from latentdiff.engines.int8 import Int8Network, is_outer
from latentdiff.errors import UsageError
from latentdiff.networks.layers import FeedForward
from latentdiff.networks.taps import Tap

pytestmark = pytest.mark.skipif(not int8.int8_is_possible(), reason="needs a CPU with VNNI instructions")

PROMPT = "a red circle left of a blue square"


@pytest.fixture
def pipe() -> Pipeline:
    return Pipeline.load(device="cpu", precision="fp32")


def shape_of(pipe: Pipeline) -> tuple[int, int, int]:
    """Of the latents of one image."""
    return pipe.unet.config.in_channels, pipe.unet.config.sample_size, pipe.unet.config.sample_size


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rounding_is_to_the_nearest_step(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    for x in (
        torch.randn(3, 50, 70),
        nn.functional.silu(torch.randn(2, 64, 9, 7)).contiguous(memory_format=torch.channels_last),
    ):
        x = x.to(dtype)
        before = x.clone()
        rounded, scale, zero = int8._rounded(x)
        assert torch.equal(x, before)
        assert rounded.stride() == x.stride() and rounded.min() == 0 and rounded.max() >= 253
        assert ((rounded.float() - zero) * scale - x.float()).abs().max() <= 0.5001 * scale
    assert int8._rounded(torch.zeros(4, 4))[0].unique().numel() == 1
    assert int8._rounded(torch.tensor([1.0, float("nan")])) is None


@torch.no_grad()
@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(96, 80), (2, 33, 96)),
        (nn.Linear(96, 80, bias=False), (2, 33, 96)),
        (nn.Conv2d(64, 80, 3, padding=1), (2, 64, 9, 7)),
        (nn.Conv2d(64, 80, 3, padding=1, stride=2), (2, 64, 9, 7)),
        (nn.Conv2d(64, 80, 1), (2, 64, 9, 7)),
        (FeedForward(64), (2, 1500, 64)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_layers_agree_with_the_exact_ones(layer: nn.Module, shape: tuple[int, ...]) -> None:
    torch.manual_seed(1)
    x = nn.functional.silu(2 * torch.randn(shape))  # all but positive, so that a wrong zero point or padding shows
    form = int8._Int8FeedForward if isinstance(layer, FeedForward) else int8._Int8Layer
    found = form(layer, int8._Rounding())(x)
    assert found.dtype == torch.float32 and relative(found, layer(x)) < (
        0.06 if isinstance(layer, FeedForward) else 0.02
    )


@torch.no_grad()
def test_nan_stays_nan(pipe: Pipeline) -> None:
    x = torch.full((1, *shape_of(pipe)), float("nan"))
    assert Int8Network(pipe.unet)(x, 500.0, pipe.encode([PROMPT])).isnan().all()


@torch.no_grad()
def test_network_is_near_and_leaves_the_modules_alone(pipe: Pipeline) -> None:
    network, text = Int8Network(pipe.unet), pipe.encode([PROMPT, ""])
    x = torch.randn(2, *shape_of(pipe), generator=torch.Generator().manual_seed(2))
    for t, near in ((500.0, 0.08), (850.0, 0.08), (950.0, 0.0), (50.0, 0.0)):
        exact = pipe.unet(x, t, text)
        assert is_outer(t) == (near == 0.0)
        error = relative(network(x, t, text), exact)
        assert error <= near and (error > 0) == (near > 0)
        assert torch.equal(pipe.unet(x, t, text), exact)


@torch.no_grad()
def test_taps_act_in_8_bits_too(pipe: Pipeline) -> None:
    network, text = Int8Network(pipe.unet), pipe.encode([PROMPT])
    x = torch.randn(1, *shape_of(pipe), generator=torch.Generator().manual_seed(2))
    for name in ("mid_block.resnets.0.conv1", "mid_block.attentions.0.transformer_blocks.0.ff.net.0"):
        with Tap(pipe.unet, [name], output=lambda name, arguments, output: 5 * output):
            assert relative(network(x, 500.0, text), pipe.unet(x, 500.0, text)) < 0.1


@torch.no_grad()
def test_changed_weights_are_rounded_anew(pipe: Pipeline) -> None:
    network, text = Int8Network(pipe.unet), pipe.encode([PROMPT])
    x = torch.randn(1, *shape_of(pipe), generator=torch.Generator().manual_seed(2))
    before = network(x, 500.0, text)
    pipe.unet.up_blocks[-1].resnets[-1].conv2.weight.mul_(-3)
    after = network(x, 500.0, text)
    assert relative(after, pipe.unet(x, 500.0, text)) < 0.1 < relative(after, before)


@torch.inference_mode()
def test_inference_mode_gives_the_same(pipe: Pipeline) -> None:
    x, text, network = (
        torch.randn(1, *shape_of(pipe)),
        pipe.encode([PROMPT]),
        Int8Network(pipe.unet),
    )
    inside = network(x, 500.0, text)
    with torch.inference_mode(False), torch.no_grad():
        assert torch.equal(inside, network(x.clone(), 500.0, text.clone()))


def test_gradients_are_refused(pipe: Pipeline) -> None:
    x = torch.randn(1, *shape_of(pipe), requires_grad=True)
    with pytest.raises(UsageError, match="no gradients"):
        Int8Network(pipe.unet)(x, 500.0, torch.randn(1, 32, pipe.unet.config.cross_attention_dim))


def test_image_is_the_exact_one_to_the_eye() -> None:
    options = {"steps": 12, "seed": 5, "progress": False}
    exact, near = (
        np.asarray(Pipeline.load(device="cpu", precision=name)(PROMPT, **options)[0], float)
        for name in ("fp32", "int8")
    )
    assert 10 * np.log10(255**2 / np.square(exact - near).mean()) > 30


def test_recipe_says_int8() -> None:
    pipe = Pipeline.load(device="cpu", precision="int8")
    recipe = pipe.recipe(prompt="", seed=0, steps=1, sampler="ddim", guidance_scale=1.0, width=8, height=8)
    assert (recipe.precision, recipe.backend) == ("int8", "torch")
    assert pipe.to("cpu", "fp32").network is pipe.unet
    with pytest.raises(UsageError, match="goes with --backend torch or openvino"):
        pipe.to("cpu", "int8").use_backend("compile")


def test_instructions_whose_sums_overflow_are_refused() -> None:
    """oneDNN held to AVX2 cuts sums off at 2^15 - 1, whatever the processor has."""
    code = "from latentdiff.engines import int8; print(int8.int8_is_possible())"
    told = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"}
    found = subprocess.run([sys.executable, "-c", code], env=told, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"


def test_a_torch_without_the_products_is_named(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lowest supported one, on a processor that has everything."""
    monkeypatch.setattr(int8, "_torch_offers_it", lambda: False)
    with pytest.raises(UsageError, match=r"torch 2\S+ does not offer .*install a newer torch"):
        Int8Network(pipe.unet)
