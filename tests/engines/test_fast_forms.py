"""The fast forms for the CPU against the plain modules."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from latentdiff.adapters.lora.adapter import LoRA
from latentdiff.adapters.lora.spec import LoRASpec
from latentdiff.engines import fast_forms
from latentdiff.networks import kernels
from latentdiff.networks.config import UNetConfig, VAEConfig
from latentdiff.networks.kernels import has_product
from latentdiff.networks.layers import FeedForward, ResnetBlock, Upsample
from latentdiff.networks.taps import Tap
from latentdiff.networks.unet import UNet
from latentdiff.networks.vae import VAE
from tests import tiny

pytestmark = pytest.mark.skipif(not has_product(torch.float32), reason="torch without oneDNN's products")

TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}  # relative to the norm


def random(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def error(out: torch.Tensor, expected: torch.Tensor) -> float:
    return ((out.double() - expected.double()).norm() / expected.double().norm()).item()


MODULES = {
    "linear": (lambda: nn.Linear(24, 40), (3, 50, 24)),
    "linear without bias": (lambda: nn.Linear(24, 40, bias=False), (3, 50, 24)),
    "few rows": (lambda: nn.Linear(24, 40), (2, 24)),
    "1x1": (lambda: nn.Conv2d(24, 40, 1), (3, 24, 5, 7)),
    "3x3, small map": (lambda: nn.Conv2d(64, 40, 3, padding=1), (3, 64, 5, 7)),
    "3x3, large map": (lambda: nn.Conv2d(64, 40, 3, padding=1), (1, 64, 25, 23)),
    "3x3, one pixel": (lambda: nn.Conv2d(64, 40, 3, padding=1), (1, 64, 1, 1)),
    "strided": (lambda: nn.Conv2d(64, 40, 3, padding=1, stride=2), (2, 64, 9, 8)),
    "resnet block": (lambda: ResnetBlock(32, 64, time_channels=None, groups=8, eps=1e-5), (2, 32, 9, 7)),
    "upsample, small": (lambda: Upsample(16), (1, 16, 5, 7)),
    "upsample, large": (lambda: Upsample(16), (2, 16, 17, 31)),
    "feed forward": (lambda: FeedForward(24), (3, 50, 24)),
}


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("name", MODULES)
@torch.no_grad()
def test_a_fast_form_equals_the_plain_module(name: str, dtype: torch.dtype, monkeypatch) -> None:
    monkeypatch.setattr(fast_forms, "FF_ROWS", 40)  # several pieces, the last one shorter
    build, shape = MODULES[name]
    module = tiny.randomize(build(), seed=3)
    expected = copy.deepcopy(module).double()(random(*shape, dtype=dtype).double())
    fast_forms.use_fast_forms(module.to(dtype))
    x = random(*shape, dtype=dtype)
    before = x.clone()
    out = module(x)
    assert out.dtype == dtype and out.shape == expected.shape
    assert error(out, expected) < TOLERANCES[dtype]
    assert torch.equal(x, before), "the input was written to"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", MODULES)
@torch.no_grad()
def test_a_format_that_the_processor_lacks_is_computed_in_float32(name: str, dtype: torch.dtype, monkeypatch) -> None:
    monkeypatch.setattr(fast_forms, "has_product", lambda dtype: dtype == torch.float32)
    build, shape = MODULES[name]
    module = tiny.randomize(build(), seed=3).to(dtype)
    expected = copy.deepcopy(module).double()(random(*shape, dtype=dtype).double())
    fast_forms.use_fast_forms(module)
    computed_in = set()
    for name_of in ("linear", "conv2d"):
        plain = getattr(nn.functional, name_of)

        def counted(x: torch.Tensor, *rest: object, plain=plain) -> torch.Tensor:
            computed_in.add(x.dtype)
            return plain(x, *rest)

        monkeypatch.setattr(nn.functional, name_of, counted)
    out = module(random(*shape, dtype=dtype))
    assert out.dtype == dtype and error(out, expected) < TOLERANCES[dtype]
    assert computed_in == {dtype if name == "few rows" else torch.float32}


@torch.no_grad()
def test_upsampling_to_another_size_is_plain() -> None:
    block = tiny.randomize(Upsample(16), seed=3)
    x = random(2, 16, 17, 19)
    expected = block(x, size=torch.Size((33, 37)))
    fast_forms.use_fast_forms(block)
    assert error(block(x, size=torch.Size((33, 37))), expected) < 1e-6


def small_unet(**options) -> UNet:
    peer = tiny.unet(**options)
    unet = UNet(UNetConfig.from_diffusers(peer.config)).eval()
    unet.load_state_dict(peer.state_dict())
    return unet


def inputs(unet: UNet, batch: int, size: tuple[int, int]) -> tuple[torch.Tensor, float, torch.Tensor]:
    return random(batch, unet.config.in_channels, *size), 500.0, random(batch, 7, unet.config.cross_attention_dim)


@pytest.mark.parametrize(("batch", "size"), [(1, (16, 16)), (2, (24, 32)), (3, (11, 9))])
@torch.no_grad()
def test_the_unet_gives_the_same(batch: int, size: tuple[int, int]) -> None:
    unet = small_unet()
    arguments = inputs(unet, batch, size)
    expected = unet(*arguments)
    weights = {name: value.clone() for name, value in unet.state_dict().items()}
    fast_forms.use_fast_forms(unet)
    assert 0 < error(unet(*arguments), expected) < 1e-5
    assert error(unet(*arguments[:2], unet.project_context(arguments[2])), expected) < 1e-5
    assert list(unet.state_dict()) == list(weights)
    assert all(torch.equal(value, weights[name]) for name, value in unet.state_dict().items())
    copied = copy.deepcopy(unet)
    nn.init.zeros_(unet.conv_out.weight)
    assert error(copied(*arguments), expected) < 1e-5  # a copy computes with its own weights


@pytest.mark.parametrize("tile", [None, 64])
@torch.no_grad()
def test_the_autoencoder_gives_the_same(tile: int | None) -> None:
    peer = tiny.vae()
    vae = VAE(VAEConfig.from_diffusers(peer.config)).eval()
    vae.load_state_dict(peer.state_dict())
    latents = random(2, vae.config.latent_channels, 20, 12)
    images = random(2, 3, 48, 32)
    expected, encoded = vae.decode(latents, tile=tile), vae.encode(images).mean
    fast_forms.use_fast_forms(vae)
    assert error(vae.decode(latents, tile=tile), expected) < 1e-5
    assert error(vae.encode(images).mean, encoded) < 1e-5


def test_gradients_are_those_of_the_plain_network() -> None:
    unet = small_unet()
    x, t, text = inputs(unet, 1, (8, 8))
    gradients = []
    for _ in range(2):
        latents = x.clone().requires_grad_()
        unet(latents, t, text).square().sum().backward()
        gradients.append((latents.grad, unet.conv_in.weight.grad.clone()))
        unet.zero_grad()
        fast_forms.use_fast_forms(unet)
    for fast, plain in zip(*reversed(gradients), strict=True):
        assert error(fast, plain) < 1e-5


@torch.no_grad()
def test_taps_see_whole_outputs_and_change_them() -> None:
    unet = small_unet()
    arguments = inputs(unet, 2, (16, 16))
    names = [name for name, _ in unet.named_modules() if name.endswith(("ff.net.0.proj", "upsamplers.0.conv", "norm1"))]
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in names}

    def halve(name: str, _: tuple, output: torch.Tensor) -> torch.Tensor:
        seen[name].append(output)
        return 0.5 * output

    results = []
    for _ in range(2):
        with Tap(unet, names, output=halve):
            results.append(unet(*arguments))
        fast_forms.use_fast_forms(unet)
    assert error(results[1], results[0]) < 1e-5
    for first, second in seen.values():
        assert error(second, first) < 1e-5


@torch.no_grad()
def test_what_a_tap_has_read_in_a_resnet_block_stays_as_it_was() -> None:
    block = tiny.randomize(ResnetBlock(32, 64, time_channels=None, groups=8, eps=1e-5), seed=3)
    x, kept = random(2, 32, 9, 7), []
    for _ in range(2):
        with Tap(block, ["norm1", "norm2", "conv2"], output=lambda name, _, output: kept.append(output)):
            block(x)
        fast_forms.use_fast_forms(block)
    for plain, fast in zip(kept[:3], kept[3:], strict=True):
        assert error(fast, plain) < 1e-5, "it was written to afterwards"


@torch.no_grad()
def test_autocast_computes_in_its_own_format() -> None:
    layer = tiny.randomize(nn.Linear(24, 40), seed=3)
    x = random(3, 50, 24)
    with torch.autocast("cpu", torch.bfloat16):
        expected = layer(x)
        fast_forms.use_fast_forms(layer)
        out = layer(x)
    assert out.dtype == expected.dtype == torch.bfloat16
    assert torch.equal(out, expected)


@torch.no_grad()
def test_torchs_own_forms_on_demand(monkeypatch) -> None:
    monkeypatch.setenv("LATENTDIFF_FORMS", "torch")
    unet = small_unet()
    arguments = inputs(unet, 2, (24, 32))
    expected = unet(*arguments)
    fast_forms.use_fast_forms(unet)
    monkeypatch.delattr(fast_forms, "product")
    assert error(unet(*arguments), expected) < 1e-5


@pytest.mark.parametrize("dtype", TOLERANCES)
@torch.no_grad()
def test_what_is_tried_is_right_and_chosen_once(dtype: torch.dtype, monkeypatch, tmp_path) -> None:
    """Every trial runs its two forms on examples where they agree, or the other form could never be chosen."""
    tried = {}

    def choose(form, trial, needed=1.0):
        if form not in tried:
            expected, found = (each().double() for each in trial())
            tried[form] = ((found - expected).norm() / expected.norm()).item()
        return True

    monkeypatch.setattr(fast_forms, "takes_fast_form", choose)
    for build, shape in MODULES.values():
        module = tiny.randomize(build(), seed=3).to(dtype)
        fast_forms.use_fast_forms(module)
        module(random(*shape, dtype=dtype))
    kinds = {name.split(" " + str(dtype).removeprefix("torch."))[0] for name in tried}
    has_format = fast_forms.has_product(dtype)
    ours = {"linear", "1x1 convolution", "3x3 convolution", "upsampling", "feed-forward"}
    assert kinds == (ours if has_format else {"widened linear", "widened convolution"})
    assert max(tried.values()) < kernels.TOLERANCE


@torch.no_grad()
def test_a_lora_acts_and_leaves_without_a_trace() -> None:
    unet = small_unet()
    arguments = inputs(unet, 2, (16, 16))
    spec = LoRASpec(rank=2, targets=("attention", "feed_forward", "convolutions"))
    lora = LoRA.create(unet, None, spec)
    for layer in lora.layers.values():
        nn.init.normal_(layer.lora_up.weight, std=0.1)
    with lora.attached(0.7):
        expected = unet(*arguments)
    fast_forms.use_fast_forms(unet)
    before = unet(*arguments)
    with lora.attached(0.7):
        assert error(unet(*arguments), expected) < 1e-5
    assert error(before, expected) > 1e-3
    assert torch.equal(unet(*arguments), before)


@torch.no_grad()
def test_restored_it_is_the_plain_network_again() -> None:
    unet = small_unet()
    arguments = inputs(unet, 1, (16, 16))
    fast_forms.use_fast_forms(unet)
    fast_forms.use_plain_forms(unet)
    assert all("forward" not in module.__dict__ for module in unet.modules())
    assert torch.equal(unet(*arguments), small_unet()(*arguments))
