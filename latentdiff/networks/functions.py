"""The networks as plain functions that never give NaN.

Images pass one at a time: an image does not depend on its neighbours, nor memory on their number.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from latentdiff.device import finite_or_float32, is_out_of_memory
from latentdiff.diffusion.denoise import is_asynchronous
from latentdiff.diffusion.guidance import Model
from latentdiff.diffusion.schedule import Level
from latentdiff.networks.conditioning import AnyConditioning, Conditioning, by_groups
from latentdiff.networks.unet import UNet
from latentdiff.networks.vae import VAE, LatentDistribution

# (x (N, C, h, w), t, text embeddings and sizes, or what `UNet.project_context` made of them) -> raw (N, C_out, h, w).
# Where something is added to the skips, a fourth argument, the residuals, which only the U-Net's own modules take.
Network = Callable[..., Tensor]

_AS_WIDE_AS_FLOAT32 = (torch.bfloat16, torch.float32)  # in their exponents


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
    """The images (N, 3, H, W) of latents (N, C, h, w), about in [-1, 1], float32; in tiles where memory is short.

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


def checked_model(network: Network, unet: UNet, levels: Sequence[Level]) -> Model:
    """The network as a function (x, t, Conditioning) -> raw output that is finite, or an error that names the step.

    Args:
        network: what computes `unet`; `unet` itself, or what an engine made of it.
        unet: computes again, in float32, what overflows.
    """
    names = {level.t: f"at step {number} of {len(levels) - 1}" for number, level in enumerate(levels[:-1], 1)}

    def run(latents: Tensor, t: float, conditioning: Conditioning) -> Tensor:
        x = latents
        if conditioning.extra_channels is not None:
            x = torch.cat([x, conditioning.extra_channels.to(x)], dim=1)

        def compute(dtype: torch.dtype) -> Tensor:
            computes = network if dtype == conditioning.dtype else unet
            residuals = conditioning.residuals(latents, t, dtype)
            added = () if residuals is None else (residuals,)
            with conditioning.with_features(unet, t, dtype):
                return computes(x.to(dtype), t, conditioning.context_in(dtype, t, unet), *added)

        if is_asynchronous(x.device) and conditioning.dtype in _AS_WIDE_AS_FLOAT32:
            return compute(
                next(unet.parameters()).dtype
            )  # float32 would overflow as well; the loop checks, and need not wait
        return finite_or_float32("the U-Net", unet, compute, where=names.get(t, f"at timestep {t:g}"))

    def model(x: Tensor, t: float, conditioning: AnyConditioning) -> Tensor:
        return by_groups(conditioning, x, lambda rows, part: run(rows, t, part))

    return model
