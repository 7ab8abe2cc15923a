"""The tiny autoencoder of TAESD (Bohan 2023): latents as diffusion models take them to images and back, at hardly
any cost, and a little blurred.

Its latents have the unit variance that the VAE here gives; no factor is applied.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from latentdiff.networks.config import VAEConfig
from latentdiff.networks.vae import LatentDistribution

WIDTH = 64  # channels of all layers
NAME = "AutoencoderTiny"  # diffusers' class
_NO_VARIANCE = -30.0  # logarithm of what the encoder does not know


@dataclass(frozen=True)
class TinyVAEConfig(VAEConfig):
    """Only the latents' channels differ between published files: 4 for Stable Diffusion 1.x and 2.x."""

    block_out_channels: tuple[int, ...] = (WIDTH,) * 4
    layers_per_block: int = 3
    scaling_factor: float = 1.0

    @classmethod
    def from_diffusers(cls, config: Mapping[str, Any]) -> Self:
        """Read an AutoencoderTiny's `config.json`."""
        return cls(latent_channels=config.get("latent_channels", 4), sample_size=config.get("sample_size") or 512)

    def to_diffusers(self) -> dict[str, Any]:
        """The `config.json` from which diffusers builds the same autoencoder."""
        return {"_class_name": NAME, "latent_channels": self.latent_channels, "sample_size": self.sample_size}


class TinyVAE(nn.Module):
    """Encoder and decoder, called as the VAE is; names in `state_dict` are diffusers'."""

    def __init__(self, config: TinyVAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = TinyEncoder(config.latent_channels)
        self.decoder = TinyDecoder(config.latent_channels)

    def encode(self, images: Tensor, *, tile: int | None = None) -> LatentDistribution:
        """Images (N, 3, H, W) in [-1, 1] -> latents (N, C, h, w), all but certain; without tiles, as `decode`."""
        mean = self.encoder(images)
        return LatentDistribution(mean, torch.full_like(mean, _NO_VARIANCE))

    def decode(self, latents: Tensor, *, tile: int | None = None) -> Tensor:
        """Latents (N, C, h, w) -> images (N, 3, H, W), about in [-1, 1]; it takes too little memory to need tiles."""
        return self.decoder(latents)


class TinyEncoder(nn.Module):
    """Images (N, 3, 8 h, 8 w) in [-1, 1] -> latents (N, C, h, w)."""

    def __init__(self, latent_channels: int = 4) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, WIDTH, 3, padding=1), _Block()]
        for _ in range(3):
            layers += [_convolution(bias=False, stride=2), _Block(), _Block(), _Block()]
        self.layers = nn.Sequential(*layers, nn.Conv2d(WIDTH, latent_channels, 3, padding=1))

    def forward(self, images: Tensor) -> Tensor:
        return self.layers((images + 1.0) / 2.0)


class TinyDecoder(nn.Module):
    """Latents (N, C, h, w) -> images (N, 3, 8 h, 8 w), about in [-1, 1]."""

    def __init__(self, latent_channels: int = 4) -> None:
        super().__init__()
        self.latent_channels = latent_channels
        layers: list[nn.Module] = [nn.Conv2d(latent_channels, WIDTH, 3, padding=1), nn.ReLU()]
        for _ in range(3):
            layers += [_Block(), _Block(), _Block(), nn.Upsample(scale_factor=2), _convolution(bias=False)]
        self.layers = nn.Sequential(*layers, _Block(), nn.Conv2d(WIDTH, 3, 3, padding=1))

    def forward(self, latents: Tensor) -> Tensor:
        return self.layers(3.0 * torch.tanh(latents / 3.0)) * 2.0 - 1.0


class _Block(nn.Module):
    """Three convolutions beside the identity."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Sequential(_convolution(), nn.ReLU(), _convolution(), nn.ReLU(), _convolution())

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.conv(x) + x)


def _convolution(*, bias: bool = True, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(WIDTH, WIDTH, 3, padding=1, bias=bias, stride=stride)
