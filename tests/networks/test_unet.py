"""The U-Net against diffusers' UNet2DConditionModel with the same random weights."""

from __future__ import annotations

import pytest
import torch
from diffusers import UNet2DConditionModel

from latentdiff.networks.config import UNetConfig
from latentdiff.networks.layers import ProjectedContext
from latentdiff.networks.unet import UNet

VARIANTS = {
    "sd1": {"attention_head_dim": 8},
    "sd2": {"attention_head_dim": (2, 4, 4, 4), "use_linear_projection": True},
    "sd2-upcast": {"attention_head_dim": (2, 4, 4, 4), "use_linear_projection": True, "upcast_attention": True},
    "inpaint": {"attention_head_dim": 8, "in_channels": 9},
    "small": {
        "block_out_channels": (32, 64),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 1,
        "attention_head_dim": (1, 4),
    },
}


def build(variant: str) -> tuple[UNet2DConditionModel, UNet]:
    torch.manual_seed(0)
    options = {
        "block_out_channels": (32, 64, 64, 64),
        "cross_attention_dim": 24,
        "sample_size": 16,
        **VARIANTS[variant],
    }
    peer = UNet2DConditionModel(**options).eval()
    for parameter in peer.parameters():  # normalisations start as the identity, which would hide a forgotten tensor
        torch.nn.init.normal_(parameter, std=0.1)
    unet = UNet(UNetConfig.from_diffusers(peer.config)).eval()
    unet.load_state_dict(peer.state_dict(), strict=True)
    return peer, unet


def inputs(unet: UNet, size: tuple[int, int] = (16, 16)) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, unet.config.in_channels, *size, generator=generator)
    context = torch.randn(2, 7, unet.config.cross_attention_dim, generator=generator)
    return x, torch.tensor([3, 981]), context


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_output_equals_diffusers(variant: str) -> None:
    peer, unet = build(variant)
    x, t, context = inputs(unet)
    expected = peer(x, t, context).sample
    torch.testing.assert_close(unet(x, t, context), expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("size", [(8, 24), (11, 9), (5, 16)])
@torch.no_grad()
def test_any_size(size: tuple[int, int]) -> None:
    peer, unet = build("sd1")
    x, t, context = inputs(unet, size)
    expected = peer(x, t, context).sample
    torch.testing.assert_close(unet(x, t, context), expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


@torch.no_grad()
def test_fractional_timestep_and_one_for_all() -> None:
    peer, unet = build("sd1")
    x, _, context = inputs(unet)
    expected = peer(x, torch.tensor(412.25), context).sample
    torch.testing.assert_close(unet(x, 412.25, context), expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


@torch.no_grad()
def test_projected_context_changes_nothing() -> None:
    _, unet = build("sd1")
    x, t, context = inputs(unet)
    projected = unet.project_context(context)
    assert torch.equal(unet(x, t, projected), unet(x, t, context))
    halves = ProjectedContext.cat([unet.project_context(context[:1]), unet.project_context(context[1:])])
    torch.testing.assert_close(unet(x, t, halves), unet(x, t, context))


def test_projected_context_covers_every_cross_attention() -> None:
    _, unet = build("sd1")
    count = sum(name.endswith("attn2") for name, _ in unet.named_modules())
    assert len(unet.project_context(torch.zeros(1, 7, 24))) == count == 16


def test_gradient_checkpointing_changes_no_gradient() -> None:
    _, unet = build("sd1")
    x, t, context = inputs(unet)
    unet(x, t, context).square().mean().backward()
    plain = {name: p.grad.clone() for name, p in unet.named_parameters()}
    unet.zero_grad()
    unet.enable_gradient_checkpointing()
    unet(x, t, context).square().mean().backward()
    for name, parameter in unet.named_parameters():
        assert torch.equal(parameter.grad, plain[name]), name
