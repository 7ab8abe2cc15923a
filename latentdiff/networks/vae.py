"""The KL autoencoder: images to latents and back (Kingma & Welling 2014; Rombach et al. 2022, section 3.1).

The scale factor that brings latents to unit variance is applied here and nowhere else: what `encode` returns and
`decode` takes is what the U-Net sees. Parameter names are those of diffusers' AutoencoderKL.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from latentdiff.errors import UsageError
from latentdiff.networks.config import VAEConfig
from latentdiff.networks.device import finite_or_float32, is_out_of_memory
from latentdiff.networks.layers import Attention, Downsample, ResnetBlock, Upsample

_EPS = 1e-6


@dataclass(frozen=True)
class LatentDistribution:
    """A normal distribution of latents with independent entries, in the units of the U-Net."""

    mean: Tensor  # (N, C, h, w)
    logvar: Tensor  # (N, C, h, w)

    def mode(self) -> Tensor:
        """The most likely latents (N, C, h, w)."""
        return self.mean

    def sample(self, noise: Tensor) -> Tensor:
        """Latents (N, C, h, w) for standard normal `noise` of the same shape."""
        return self.mean + (0.5 * self.logvar).exp() * noise

    def kl(self) -> Tensor:
        """Kullback-Leibler divergence from the standard normal in nats per entry, (N, C, h, w) (Kingma & Welling, app.
        B)."""
        return 0.5 * (self.mean.square() + self.logvar.exp() - 1.0 - self.logvar)


class VAE(nn.Module):
    """Encoder and decoder of latent diffusion.

    Images are (N, 3, H, W) in [-1, 1] with H and W multiples of `config.downscale`; latents are
    (N, latent_channels, H / downscale, W / downscale).
    """

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(2 * config.latent_channels, 2 * config.latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(config.latent_channels, config.latent_channels, 1)

    def encode(self, images: Tensor, *, tile: int | None = None) -> LatentDistribution:
        """Images (N, 3, H, W) in [-1, 1] -> distribution of latents (N, C, h, w); `tile` as in `decode`."""
        moments = self._encode(images) if tile is None else self._encode_tiled(images, self._latents_of(tile))
        mean, logvar = moments.chunk(2, dim=1)
        # Beyond these bounds the variance is zero or infinite in float32 anyway; inside, nothing changes.
        logvar = logvar.clamp(-30.0, 20.0)
        scale = self.config.scaling_factor
        return LatentDistribution(mean * scale, logvar + 2 * math.log(scale))

    def decode(self, latents: Tensor, *, tile: int | None = None) -> Tensor:
        """Latents (N, C, h, w) -> images (N, 3, H, W), about in [-1, 1] and not clipped.

        Args:
            latents: what `encode` gave or the denoise loop made.
            tile: decode overlapping tiles of so many pixels and blend them. Memory then does not grow with the
                image; tiles differ a little from the whole because each is normalised by its own statistics.
        """
        latents = latents / self.config.scaling_factor
        return self._decode(latents) if tile is None else self._decode_tiled(latents, self._latents_of(tile))

    def unscaled(self, latents: Tensor) -> Tensor:
        """Latents as the encoder itself gave them, which some models see (Brooks et al. 2023)."""
        return latents / self.config.scaling_factor

    def _latents_of(self, pixels: int) -> int:
        return max(1, pixels // self.config.downscale)

    def _encode(self, images: Tensor) -> Tensor:
        return self.quant_conv(self.encoder(images))

    def _encode_tiled(self, images: Tensor, tile: int) -> Tensor:
        factor = self.config.downscale
        height, width = images.shape[-2] // factor, images.shape[-1] // factor
        total = images.new_zeros(len(images), 2 * self.config.latent_channels, height, width)
        weights = images.new_zeros(height, width)
        for top, left in _corners(height, width, tile):
            seen = images[..., top * factor : (top + tile) * factor, left * factor : (left + tile) * factor]
            _blend(total, weights, self._encode(seen), top, left)
        return total / weights

    def _decode(self, z: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(z))

    def _decode_tiled(self, z: Tensor, tile: int) -> Tensor:
        factor = self.config.downscale
        shape = (z.shape[0], self.config.out_channels, z.shape[-2] * factor, z.shape[-1] * factor)
        total, weights = z.new_zeros(shape), z.new_zeros(shape[-2:])
        for top, left in _corners(*z.shape[-2:], tile):
            image = self._decode(z[..., top : top + tile, left : left + tile])
            _blend(total, weights, image, top * factor, left * factor)
        return total / weights


class Encoder(nn.Module):
    """Image (N, 3, H, W) -> mean and log-variance of the latents, (N, 2 C, h, w)."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        widths = config.block_out_channels
        inputs = (widths[0], *widths[:-1])
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            _DownLevel(config, inputs[i], widths[i], last=i == len(widths) - 1) for i in range(len(widths))
        )
        self.mid_block = _MidBlock(config, widths[-1])
        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, widths[-1], eps=_EPS)
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        x = self.conv_in(x)
        for level in self.down_blocks:
            x = level(x)
        x = self.mid_block(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class Decoder(nn.Module):
    """Latents (N, C, h, w) -> image (N, 3, H, W)."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        widths = config.block_out_channels[::-1]
        inputs = (widths[0], *widths[:-1])
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid_block = _MidBlock(config, widths[0])
        self.up_blocks = nn.ModuleList(
            _UpLevel(config, inputs[i], widths[i], last=i == len(widths) - 1) for i in range(len(widths))
        )
        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, widths[-1], eps=_EPS)
        self.conv_out = nn.Conv2d(widths[-1], config.out_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        """See the class."""
        x = self.mid_block(self.conv_in(z))
        for level in self.up_blocks:
            x = level(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class _DownLevel(nn.Module):
    def __init__(self, config: VAEConfig, in_channels: int, out_channels: int, *, last: bool) -> None:
        super().__init__()
        self.resnets = _resnets(config, in_channels, out_channels, config.layers_per_block)
        self.downsamplers = nn.ModuleList([] if last else [Downsample(out_channels, symmetric=False)])

    def forward(self, x: Tensor) -> Tensor:
        for block in (*self.resnets, *self.downsamplers):
            x = block(x)
        return x


class _UpLevel(nn.Module):
    def __init__(self, config: VAEConfig, in_channels: int, out_channels: int, *, last: bool) -> None:
        super().__init__()
        self.resnets = _resnets(config, in_channels, out_channels, config.layers_per_block + 1)
        self.upsamplers = nn.ModuleList([] if last else [Upsample(out_channels)])

    def forward(self, x: Tensor) -> Tensor:
        for block in (*self.resnets, *self.upsamplers):
            x = block(x)
        return x


class _MidBlock(nn.Module):
    def __init__(self, config: VAEConfig, channels: int) -> None:
        super().__init__()
        self.resnets = _resnets(config, channels, channels, 2)
        self.attentions = nn.ModuleList([_PixelAttention(channels, config.norm_num_groups)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.resnets[0](x)
        x = self.attentions[0](x)
        return self.resnets[1](x)


class _PixelAttention(Attention):
    """Single-head self-attention over the pixels of a feature map, as a residual."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__(channels, channels, heads=1, bias=True)
        self.group_norm = nn.GroupNorm(groups, channels, eps=_EPS)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, h, w) -> (N, C, h, w)."""
        tokens = self.group_norm(x).flatten(2).transpose(1, 2)  # (N, h w, C)
        out = super().forward(tokens, tokens)
        return x + out.transpose(1, 2).unflatten(2, x.shape[-2:])


def _resnets(config: VAEConfig, in_channels: int, out_channels: int, count: int) -> nn.ModuleList:
    inputs = (in_channels, *(out_channels,) * (count - 1))
    return nn.ModuleList(
        ResnetBlock(channels, out_channels, time_channels=None, groups=config.norm_num_groups, eps=_EPS)
        for channels in inputs
    )


def _corners(height: int, width: int, tile: int) -> list[tuple[int, int]]:
    """Top and left of tiles over latents."""
    return [(top, left) for top in _tile_starts(height, tile) for left in _tile_starts(width, tile)]


def _blend(total: Tensor, weights: Tensor, piece: Tensor, top: int, left: int) -> None:
    """Add a tile to the weighted sum and to the sum of the weights."""
    height, width = piece.shape[-2:]
    feather = _feather(height, piece)[:, None] * _feather(width, piece)[None, :]
    area = (..., slice(top, top + height), slice(left, left + width))
    total[area] += piece * feather
    weights[area] += feather


def _tile_starts(size: int, tile: int) -> list[int]:
    """First entries of tiles that cover `size` and overlap by at least a quarter of a tile."""
    if size <= tile:
        return [0]
    count = math.ceil((size - tile) / max(1, tile * 3 // 4)) + 1
    return [round(i * (size - tile) / (count - 1)) for i in range(count)]


def _feather(length: int, like: Tensor) -> Tensor:
    """Weights of a tile along one side: 1 in the middle, falling towards the borders, never 0."""
    position = torch.arange(1, length + 1, device=like.device, dtype=like.dtype)
    return torch.minimum(position, length + 1 - position).clamp(max=max(1, length // 4)) / max(1, length // 4)


class LatentDecoder(Protocol):
    """What `VAE.decode` is: latents to images."""

    def __call__(self, latents: Tensor, *, tile: int | None = None) -> Tensor:
        """Latents (N, C, h, w) -> images (N, 3, H, W), about in [-1, 1]."""
        ...


def encode_images(
    vae: VAE, images: Tensor, device: torch.device, *, tile: int | None = None
) -> LatentDistribution:
    """The latents of images (N, 3, H, W) in [-1, 1], float32; `tile` as `VAE.encode` takes it."""

    def compute(image: Tensor, dtype: torch.dtype) -> Tensor:
        found = vae.encode(image.to(device, dtype), tile=tile)
        return torch.cat([found.mean, found.logvar], dim=1)  # (1, 2 C, h, w)

    encoded = [
        finite_or_float32("the VAE's encoder", vae, partial(compute, image)).float() for image in images.split(1)
    ]
    return LatentDistribution(*torch.cat(encoded).chunk(2, dim=1))


def decode_latents(
    decoder: LatentDecoder, vae: VAE, latents: Tensor, device: torch.device, *, tile: int | None = None
) -> Tensor:
    """The images (N, 3, H, W) of latents (N, C, h, w), about in [-1, 1], float32; one at a time, so that an
    image does not depend on its neighbours; in tiles where memory is short.

    Args:
        decoder: what computes `vae.decode`; that itself, or what an engine made of it.
        tile: decode in tiles of so many pixels at once; see `VAE.decode`.
    """
    return torch.cat([_decode_one(decoder, vae, latent, device, tile) for latent in latents.split(1)])


def _decode_one(decoder: LatentDecoder, vae: VAE, latent: Tensor, device: torch.device, tile: int | None) -> Tensor:
    own = next(vae.parameters()).dtype

    def compute(dtype: torch.dtype, tile: int | None = tile) -> Tensor:
        computes = decoder if dtype == own else vae.decode
        return computes(latent.to(device, dtype), tile=tile)

    try:
        return finite_or_float32("the VAE's decoder", vae, compute).float()
    except (RuntimeError, MemoryError) as error:
        if tile or not is_out_of_memory(error):
            raise
    # Outside of the block above: as long as the error is handled, it keeps everything alive that the decoder had made.
    warnings.warn("not enough memory to decode the image whole; decoding it in tiles", stacklevel=2)
    return finite_or_float32("the VAE's decoder", vae, partial(compute, tile=vae.config.sample_size)).float()


def latent_shape(
    asked: tuple[int | None, int | None],
    trained: tuple[int, int],
    vae: VAEConfig,
    latents: Tensor | None,
    count: int,
) -> tuple[int, int, int]:
    """(C, h, w) of one image's latents; sizes are (height, width) in pixels.

    What is asked for counts, else the size of the given `latents`, else that of the training.

    Raises:
        UsageError: a size that the VAE cannot make, or latents of another shape.
    """
    factor = vae.downscale
    given = (None, None) if latents is None else tuple(factor * side for side in latents.shape[-2:])
    size = [next(side for side in sides if side is not None) for sides in zip(asked, given, trained, strict=True)]
    for name, side in zip(("height", "width"), size, strict=True):
        if side <= 0 or side % factor:
            raise UsageError(f"expected a {name} that is a positive multiple of {factor}, found {side}")
    shape = (vae.latent_channels, size[0] // factor, size[1] // factor)
    if latents is not None and latents.shape != (count, *shape):
        raise UsageError(f"expected latents of shape {(count, *shape)}, found {tuple(latents.shape)}")
    return shape
