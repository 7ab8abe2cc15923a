"""Prompts and pictures into the numbers that the U-Net works on, and back: one at a time, and never NaN.

One at a time, so that a picture does not depend on its neighbours and memory does not grow with their number.
"""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from latentdiff.device import finite_or_float32, is_out_of_memory
from latentdiff.engines import Decoder
from latentdiff.prompt import tokenize
from latentdiff.vae import VAE, LatentDistribution


def embed_prompt(tokenizer: Any, text_encoder: nn.Module, text: str, device: torch.device) -> Tensor:
    """The embeddings (1, L, C) of a prompt, float32."""
    token_ids = tokenize(tokenizer, [text]).to(device)  # (1, L)
    return finite_or_float32("the text encoder", text_encoder, lambda _: text_encoder(token_ids), where=f"on {text!r}").float()


def encode_pictures(vae: VAE, images: Tensor, device: torch.device) -> LatentDistribution:
    """The latents of pictures (N, 3, H, W) in [-1, 1], float32."""

    def compute(image: Tensor, dtype: torch.dtype) -> Tensor:
        found = vae.encode(image.to(device, dtype))
        return torch.cat([found.mean, found.logvar], dim=1)  # (1, 2 C, h, w)

    encoded = [finite_or_float32("the VAE's encoder", vae, partial(compute, image)).float() for image in images.split(1)]
    return LatentDistribution(*torch.cat(encoded).chunk(2, dim=1))


def decode_latents(decoder: Decoder, vae: VAE, latents: Tensor, device: torch.device, *, tiled: bool = False) -> Tensor:
    """The pictures (N, 3, H, W) of latents (N, C, h, w), about in [-1, 1], float32; in tiles where memory is short.

    Args:
        decoder: what computes `vae.decode`; that itself, or what an engine made of it.
        tiled: decode in tiles at once; see `VAE.decode`.
    """
    return torch.cat([_decode_one(decoder, vae, latent, device, tiled) for latent in latents.split(1)])


def _decode_one(decoder: Decoder, vae: VAE, latent: Tensor, device: torch.device, tiled: bool) -> Tensor:
    own = next(vae.parameters()).dtype

    def compute(dtype: torch.dtype, tiled: bool = tiled) -> Tensor:
        computes = decoder if dtype == own else vae.decode
        return computes(latent.to(device, dtype), tiled=tiled)

    try:
        return finite_or_float32("the VAE's decoder", vae, compute).float()
    except (RuntimeError, MemoryError) as error:
        if tiled or not is_out_of_memory(error):
            raise
    # Outside of the block above: as long as the error is handled, it keeps everything alive that the decoder had made.
    warnings.warn("not enough memory to decode the picture whole; decoding it in tiles", stacklevel=2)
    return finite_or_float32("the VAE's decoder", vae, partial(compute, tiled=True)).float()
