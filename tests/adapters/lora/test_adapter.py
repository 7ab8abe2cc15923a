"""Attaching, detaching and merging."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from latentdiff.adapters.lora.adapter import LoRA, merge
from latentdiff.adapters.lora.spec import LoRASpec
from latentdiff.errors import UsageError
from tests import peers
from tests.adapters.lora import conftest
from tests.adapters.lora.conftest import fill

EVERYTHING = LoRASpec(rank=4, alpha=2, targets=conftest.EVERYTHING)
TOKENS = torch.tensor([[49, 7, 300, 12]])


@pytest.fixture(params=peers.FAMILIES)
def model(request):
    pipe = peers.ours(request.param)
    return pipe.unet.requires_grad_(False), pipe.text_encoder.requires_grad_(False)


def outputs(model, dtype=torch.float32):
    unet, text_encoder = model
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, 16, 16, generator=generator).to(dtype)  # the lowest level has more than one pixel
    context = torch.randn(2, 5, unet.config.cross_attention_dim, generator=generator).to(dtype)
    return unet(x, torch.tensor([10.0, 700.0]), context), text_encoder(TOKENS)


def test_a_new_lora_changes_nothing(model):
    before = outputs(model)
    with LoRA.create(*model, EVERYTHING).attached():
        assert all(map(torch.equal, before, outputs(model)))


def test_detaching_restores_every_bit(model):
    weights = {name: p.clone() for part in model for name, p in part.state_dict().items()}
    before = outputs(model)
    lora = fill(LoRA.create(*model, EVERYTHING))
    with pytest.raises(RuntimeError), lora.attached(0.7):
        changed = outputs(model)
        raise RuntimeError
    assert all((a - b).abs().max() > 0.01 for a, b in zip(before, changed, strict=True))
    assert all(map(torch.equal, before, outputs(model)))
    assert all(torch.equal(weights[name], p) for part in model for name, p in part.state_dict().items())


def test_every_adaptable_layer_is_reached(model):
    lora = LoRA.create(*model, EVERYTHING)
    every = [m for part in model for m in part.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    assert len(lora.layers) == len(every)
    with lora.attached():
        sum(output.square().mean() for output in outputs(model)).backward()
    for name, layer in lora.layers.items():
        assert layer.lora_up.weight.count_nonzero() == 0 and layer.lora_down.weight.count_nonzero() > 0
        assert layer.lora_up.weight.grad.abs().sum() > 0, name


def test_merged_equals_attached(model):
    one, two = fill(LoRA.create(*model, EVERYTHING)), fill(LoRA.create(*model, LoRASpec(rank=2)), 2)
    with one.attached(0.5), two.attached(-0.25):
        attached = outputs(model)
    merge([(one, 0.5), (two, -0.25)])
    for a, b in zip(attached, outputs(model), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_scale_and_alpha_multiply(model):
    lora = fill(LoRA.create(*model, LoRASpec(rank=4, alpha=8)))
    with lora.attached(0.5):
        whole = outputs(model)[0]
    for layer in lora.layers.values():
        layer.alpha = 4
    with lora.attached():
        torch.testing.assert_close(outputs(model)[0], whole)


@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_base(model, autocast):
    lora = fill(LoRA.create(*model, EVERYTHING))
    with lora.attached():
        exact = outputs(model)
    for part in model:
        part.to(torch.bfloat16)
    context = torch.autocast("cpu", torch.bfloat16, enabled=autocast)
    with lora.attached(), context:
        half = outputs(model, torch.bfloat16)
    assert all(p.dtype == torch.float32 for p in lora.parameters())
    assert half[0].dtype == torch.bfloat16
    for a, b in zip(exact, half, strict=True):
        assert (a - b).norm() < 0.1 * a.norm()


def test_gradient_checkpointing_changes_nothing(model):
    gradients = []
    for checkpointing in (False, True):
        unet = copy.deepcopy(model[0])
        if checkpointing:
            unet.enable_gradient_checkpointing()
        lora = fill(LoRA.create(unet, None, LoRASpec(rank=4, targets=("attention", "convolutions"))))
        with lora.attached():
            outputs((unet, model[1]))[0].square().mean().backward()
        gradients.append([p.grad for p in lora.parameters()])
        assert not any(p.grad is not None for p in unet.parameters())
    assert all(map(torch.equal, *gradients))
    assert all(g.abs().sum() > 0 for g in gradients[0])


def test_seed_decides(model):
    a, b, c = (LoRA.create(*model, LoRASpec(), seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not any(torch.equal(a[name], c[name]) for name in a if "lora_down" in name)


def test_creating_draws_no_global_noise(model):
    torch.manual_seed(5)
    LoRA.create(*model, EVERYTHING)
    drawn = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(3), drawn)


def test_copies_do_not_copy_the_model(model):
    lora = fill(LoRA.create(*model, LoRASpec()))
    twin = copy.deepcopy(lora)
    with lora.attached():
        a = outputs(model)
    with twin.attached():
        assert all(map(torch.equal, a, outputs(model)))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rank": 0}, "rank of 1 or more, found 0"),
        ({"alpha": 0}, "alpha above 0, found 0"),
        ({"targets": ()}, "targets, found none"),
        ({"targets": ("attention", "atention")}, "'atention' fits no layer"),
    ],
)
def test_impossible_specs(model, fields, message):
    with pytest.raises(UsageError, match=message):
        LoRA.create(*model, LoRASpec(**fields))
