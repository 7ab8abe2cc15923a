"""A tiny model in both implementations, and LoRAs with an effect."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from latentdiff.adapters.lora.adapter import LoRA
from latentdiff.adapters.lora.spec import LoRASpec
from tests import peers

EVERYTHING = (
    "attention", "feed_forward", "projections", "convolutions", "text_encoder", "text_encoder_mlp",
    "unet.conv_*", "unet.time_embedding.*", "*.time_emb_proj",
)  # fmt: skip


def fill(lora: LoRA, seed: int = 1, std: float = 0.1) -> LoRA:
    """Give every adapter an effect of its own."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in lora.parameters():
        nn.init.normal_(parameter, std=std, generator=generator)
    return lora


def make(pipe, targets=EVERYTHING, rank=4, alpha=2.0, seed=1) -> LoRA:
    """A filled LoRA of one of our pipelines."""
    return fill(LoRA.create(pipe.unet, pipe.text_encoder, LoRASpec(rank, alpha, targets)), seed)


def our_image(pipe) -> np.ndarray:
    (image,) = pipe("a photo of the cat", negative_prompt="dog", steps=2, seed=3, progress=False)
    return np.asarray(image).astype(int)


def their_image(pipe) -> np.ndarray:
    """The same image by diffusers."""
    from diffusers import DDIMScheduler

    from latentdiff.diffusion.latents import start_noise

    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    (image,) = pipe(
        "a photo of the cat",
        negative_prompt="dog",
        num_inference_steps=2,
        guidance_scale=5.0,
        latents=start_noise([3], (4, 8, 8)),
    ).images
    return np.asarray(image).astype(int)


def our_outputs(pipe) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs of the U-Net and of the text encoder."""
    x, t, context, tokens = _inputs(pipe.unet.config.cross_attention_dim)
    with torch.no_grad():
        return pipe.unet(x, t, context), pipe.text_encoder(tokens)


def their_outputs(pipe) -> tuple[torch.Tensor, torch.Tensor]:
    x, t, context, tokens = _inputs(pipe.unet.config.cross_attention_dim)
    with torch.no_grad():
        return pipe.unet(x, t, context).sample, pipe.text_encoder(tokens).last_hidden_state


def _inputs(width: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, 8, 8, generator=generator)
    context = torch.randn(2, 5, width, generator=generator)
    return x, torch.tensor([10, 700]), context, torch.tensor([[49, 7, 300, 12]])


@pytest.fixture(params=peers.FAMILIES)
def family(request) -> str:
    return request.param


@pytest.fixture
def ours(family):
    return peers.ours(family)


@pytest.fixture
def theirs(family):
    """A diffusers pipeline of the same model, with nothing attached; it may be changed."""
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(peers.folder(family), safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe
