"""The autoencoder against diffusers' AutoencoderKL with the same random weights."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from diffusers import AutoencoderKL

from latentdiff.networks.config import VAEConfig
from latentdiff.networks.vae import VAE, LatentDistribution


@pytest.fixture(scope="module")
def pair() -> tuple[AutoencoderKL, VAE]:
    torch.manual_seed(0)
    peer = AutoencoderKL(
        block_out_channels=(16, 32, 32, 32),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        norm_num_groups=16,
        sample_size=64,
    ).eval()
    for parameter in peer.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    vae = VAE(VAEConfig.from_diffusers(peer.config)).eval()
    vae.load_state_dict(peer.state_dict(), strict=True)
    return peer, vae


@torch.no_grad()
def test_encode_equals_diffusers_in_scaled_units(pair) -> None:
    peer, vae = pair
    images = torch.rand(2, 3, 48, 64) * 2 - 1
    expected = peer.encode(images).latent_dist
    scale = vae.config.scaling_factor
    distribution = vae.encode(images)
    torch.testing.assert_close(distribution.mode(), expected.mean * scale, rtol=1e-5, atol=1e-6)
    noise = torch.randn_like(expected.mean)
    torch.testing.assert_close(
        distribution.sample(noise), (expected.mean + expected.std * noise) * scale, rtol=1e-5, atol=1e-5
    )


@torch.no_grad()
def test_decode_equals_diffusers_in_scaled_units(pair) -> None:
    peer, vae = pair
    latents = torch.randn(2, 4, 6, 8)
    expected = peer.decode(latents / vae.config.scaling_factor).sample
    torch.testing.assert_close(vae.decode(latents), expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


def test_kl_equals_diffusers(pair) -> None:
    peer, vae = pair
    images = torch.rand(1, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        expected = peer.encode(images).latent_dist.kl()
        distribution = VAE.encode(vae, images)
        scale = vae.config.scaling_factor
        raw = LatentDistribution(distribution.mean / scale, distribution.logvar - 2 * torch.tensor(scale).log())
    torch.testing.assert_close(raw.kl().sum(dim=(1, 2, 3)), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_one_tile_is_the_whole_image(pair) -> None:
    _, vae = pair
    latents = torch.randn(1, 4, 8, 8)
    torch.testing.assert_close(vae.decode(latents, tile=vae.config.sample_size), vae.decode(latents))


@pytest.mark.parametrize("size", [(9, 8), (20, 13), (40, 8)])
@torch.no_grad()
def test_tiles_cover_every_pixel_with_weights_that_sum_to_one(pair, size, monkeypatch) -> None:
    _, vae = pair
    enlarge = torch.nn.Upsample(scale_factor=8)
    monkeypatch.setattr(vae, "_decode", lambda z: enlarge(z[:, :3]))
    latents = torch.randn(1, 4, *size)
    expected = enlarge(latents[:, :3]) / vae.config.scaling_factor
    torch.testing.assert_close(vae.decode(latents, tile=vae.config.sample_size), expected)


@pytest.mark.parametrize("size", [(64, 64), (136, 72), (320, 64)])
@torch.no_grad()
def test_tiles_of_images_cover_every_latent(pair, size, monkeypatch) -> None:
    _, vae = pair
    shrink = torch.nn.AvgPool2d(8)
    monkeypatch.setattr(vae, "_encode", lambda images: shrink(images).repeat(1, 3, 1, 1)[:, :8])
    images = torch.rand(1, 3, *size) * 2 - 1
    torch.testing.assert_close(vae.encode(images, tile=64).mean, vae.encode(images).mean)


@torch.no_grad()
def test_tiles_leave_no_seams(pair) -> None:
    """Where tiles of a smooth image meet, it changes no more than elsewhere, which is not so where they are only joined."""
    _, vae = pair
    latents = 2 * torch.randn(1, 4, 1, 1) + torch.linspace(-3, 3, 36)[None, None, None, :].expand(1, 4, 8, 36)
    found = vae.decode(latents, tile=96)  # 12 latents, from 0, 8, 16, 24
    joined = torch.cat([vae.decode(part) for part in latents.split(12, dim=-1)], dim=-1)

    def steps(images: torch.Tensor) -> torch.Tensor:
        return images.diff(dim=-1).abs().mean(dim=(0, 1, 2))

    assert steps(joined)[95] > 2 * steps(joined)[40:56].max()
    inside = steps(found)[8:-8]
    assert inside[87] < 2 * inside.median() and inside.max() < 0.8 * steps(joined)[95]


def test_downscale_follows_the_number_of_levels() -> None:
    assert VAEConfig().downscale == 8
    assert replace(VAEConfig(), block_out_channels=(128, 256, 512)).downscale == 4
