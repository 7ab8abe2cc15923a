"""Lean layers compute the same, forwards and backwards, keep less, and leave nothing behind."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from latentdiff.adapters.lora.adapter import LoRA
from latentdiff.adapters.lora.spec import LoRASpec
from latentdiff.networks.config import UNetConfig
from latentdiff.networks.kernels import has_product
from latentdiff.networks.layers import FeedForward, ResnetBlock
from latentdiff.networks.taps import Tap
from latentdiff.networks.unet import UNet
from latentdiff.training import lean
from latentdiff.training.lean import lean_layers
from tests import tiny

pytestmark = pytest.mark.skipif(not has_product(torch.float32), reason="lean layers are for x86 processors")


def unet(**changes) -> UNet:
    config = UNetConfig(**{
        "in_channels": 4, "out_channels": 4, "sample_size": 12, "block_out_channels": (16, 32), "layers_per_block": 1,
        "attention_levels": (True, True), "num_heads": (2, 4), "cross_attention_dim": 24, "use_linear_projection": False,
        "norm_num_groups": 8, **changes,
    })  # fmt: skip
    return tiny.randomize(UNet(config), 0).to(memory_format=torch.channels_last)


def gradients(network: nn.Module, *inputs: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The output, and the gradients of the floating-point inputs and the parameters."""
    wanted = [x.requires_grad_() for x in inputs if x.is_floating_point()] + [p for p in network.parameters()]
    out = network(*inputs)
    weights = torch.linspace(-1, 1, out.numel()).view(out.shape)
    return out.detach(), list(torch.autograd.grad((out * weights).sum(), wanted))


def assert_close(lean_result, plain_result):
    for mine, reference in zip([lean_result[0], *lean_result[1]], [plain_result[0], *plain_result[1]], strict=True):
        assert (mine - reference).norm() <= 2e-5 * reference.norm() + 1e-9


def seeded(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float32)


@pytest.mark.parametrize("batch, side", [(1, 8), (2, 12), (6, 16)])  # few, some and many pixels
@pytest.mark.parametrize("linear, many", [(False, 2**22), (True, 1)])
def test_a_unet_has_the_same_gradients(batch, side, linear, many, monkeypatch):
    monkeypatch.setattr(lean, "_MANY_NUMBERS", many)
    network = unet(use_linear_projection=linear).double()
    inputs = seeded(batch, 4, side, side), torch.arange(batch) * 10, seeded(batch, 5, 24)
    exact = gradients(network, inputs[0].double(), inputs[1], inputs[2].double())
    network = network.float()
    with lean_layers(network):
        found = gradients(network, *inputs)
    assert_close(found, (exact[0].float(), [gradient.float() for gradient in exact[1]]))


@pytest.mark.parametrize(
    "layer, shape",
    [
        (nn.Linear(6, 10), (3, 4, 6)),
        (nn.Linear(6, 10, bias=False), (4, 6)),
        (nn.Conv2d(6, 10, 1), (2, 6, 5, 3)),
        (nn.Conv2d(6, 10, 3, padding=1), (2, 6, 5, 3)),
        (nn.Conv2d(6, 10, 3, padding=1), (5, 6, 8, 8)),
        (nn.Conv2d(6, 10, 3, padding=1, bias=False), (2, 6, 30, 30)),
        (nn.Conv2d(6, 10, 3, padding=1, stride=2), (2, 6, 6, 6)),
        (FeedForward(8), (2, 7, 8)),
        (ResnetBlock(8, 16, time_channels=None, groups=4, eps=1e-5), (2, 8, 6, 5)),
    ],
    ids=str,
)
@pytest.mark.parametrize("last", [False, True], ids=["channels first", "channels last"])
def test_each_layer_has_the_same_gradients(layer, shape, last):
    x = seeded(*shape)
    if last and x.ndim == 4:
        layer, x = layer.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)
    layer = tiny.randomize(layer, 1)
    plain = gradients(layer, x)
    with lean_layers(layer):
        assert_close(gradients(layer, x.detach()), plain)


def test_only_what_is_trained_gets_gradients():
    block = ResnetBlock(64, 64, time_channels=None, groups=32, eps=1e-5).to(memory_format=torch.channels_last)
    block.conv1.weight.requires_grad_(False)
    block.norm2.requires_grad_(False)
    ff = FeedForward(8)
    ff.net[2].requires_grad_(False)
    with lean_layers(block, ff):
        block(seeded(1, 64, 16, 16).contiguous(memory_format=torch.channels_last)).sum().backward()
        ff(seeded(2, 3, 8)).sum().backward()
    for network in (block, ff):
        assert {name for name, p in network.named_parameters() if p.grad is None} == {
            name for name, p in network.named_parameters() if not p.requires_grad
        }


def kept_bytes(network: nn.Module, *inputs: torch.Tensor) -> int:
    """Bytes that the forward pass keeps for the backward pass, without the parameters."""
    parameters = {p.untyped_storage().data_ptr() for p in network.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        result = network(*inputs)
    assert result.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize("many, share", [(2**22, 0.7), (1, 0.55)])
def test_less_is_kept_for_the_backward_pass(many, share, monkeypatch):
    monkeypatch.setattr(lean, "_MANY_NUMBERS", many)
    network = unet()
    inputs = seeded(2, 4, 32, 32), torch.tensor([3, 7]), seeded(2, 5, 24)
    plain = kept_bytes(network, *inputs)
    with lean_layers(network):
        assert kept_bytes(network, *inputs) < share * plain


def test_classes_come_back_after_an_error():
    network = unet()
    before = [type(module) for module in network.modules()]
    with pytest.raises(ZeroDivisionError), lean_layers(network):
        assert type(network.conv_in) is not nn.Conv2d and isinstance(network.conv_in, nn.Conv2d)
        raise ZeroDivisionError
    assert [type(module) for module in network.modules()] == before


def test_adapters_and_taps_inside_are_heard():
    network = unet()
    lora = LoRA.create(network, None, LoRASpec(rank=2, targets=("attention", "feed_forward", "convolutions")))
    tiny.randomize(lora, 3)
    inputs = seeded(2, 4, 8, 8), torch.tensor([3, 7]), seeded(2, 5, 24)
    with torch.no_grad(), lora.attached():
        plain = network(*inputs)
        with lean_layers(network):
            found = network(*inputs)
    torch.testing.assert_close(found, plain, rtol=1e-5, atol=1e-5)
    seen = []
    with lean_layers(network), Tap(network, ["mid_block.resnets.0.norm1"], output=lambda name, *_: seen.append(name)):
        network(*inputs)
    assert seen == ["mid_block.resnets.0.norm1"]


def test_other_precisions_compute_as_always():
    network = unet()
    inputs = seeded(2, 4, 8, 8), torch.tensor([3, 7]), seeded(2, 5, 24)
    with torch.autocast("cpu", torch.bfloat16):
        plain = network(*inputs)
        with lean_layers(network):
            assert torch.equal(network(*inputs), plain)


def test_gradient_checkpointing_changes_nothing():
    network, inputs = unet(), (seeded(2, 4, 8, 8), torch.tensor([3, 7]), seeded(2, 5, 24))
    with lean_layers(network):
        plain = gradients(network, *(x.clone() for x in inputs))
        network.enable_gradient_checkpointing()
        again = gradients(network, *inputs)
    assert all(torch.equal(a, b) for a, b in zip(plain[1], again[1], strict=True))


def test_without_onednn_nothing_changes(monkeypatch):
    monkeypatch.setattr(lean, "has_product", lambda dtype: False)
    network = nn.Linear(2, 2)
    with lean_layers(network):
        assert type(network) is nn.Linear
