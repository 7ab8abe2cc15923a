"""What a U-Net sees while it makes images: examples for engines that fit their number formats to them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from latentdiff.diffusion.denoise import denoise
from latentdiff.diffusion.guidance import Guidance, guided_denoiser
from latentdiff.diffusion.latents import NoiseStream
from latentdiff.diffusion.parameterization import parameterization
from latentdiff.diffusion.samplers import get_sampler
from latentdiff.diffusion.schedule import Schedule
from latentdiff.engines import Example
from latentdiff.networks.conditioning import Conditioning
from latentdiff.networks.layers import Context, ProjectedContext
from latentdiff.networks.sizes import Told
from latentdiff.networks.steering import checked_model
from latentdiff.networks.text_embedding import PromptEncoder
from latentdiff.networks.unet import UNet

PROMPTS = (
    "a red circle left of a blue square",
    "a photograph of a cat on a sofa",
    "a lake in the mountains, oil painting",
)
STEPS = 10
GUIDANCE_SCALE = 5.0


@torch.no_grad()
def calibration_examples(
    tokenizer: Any,
    text_encoder: nn.Module,
    unet: UNet,
    schedule: Schedule,
    latent_channels: int,
    sizes: Told | None = None,
) -> list[Example]:
    """The inputs (x (2, C, h, w), t, text) of every call while `unet` makes images of a few prompts with guidance.

    The images have the size of the training, which a U-Net that is told `sizes` is told, and always the same seeds.
    """
    guidance = Guidance(scale=GUIDANCE_SCALE)
    sampler = get_sampler("ddim")
    levels = sampler.levels(schedule, STEPS, "trailing")
    device = next(unet.parameters()).device
    side = unet.config.sample_size
    examples: list[Example] = []

    def recording(x: Tensor, t: Tensor | float, context: Context) -> Tensor:
        projected = context if isinstance(context, ProjectedContext) else unet.project_context(context)
        examples.append((x, float(t), projected))
        return unet(x, t, context)

    others = (
        unet.config.in_channels - latent_channels
    )  # of an inpainting model: a mask of all, and nothing outside of it
    extra = torch.zeros(1, others, side, side, device=device, dtype=torch.float32) if others else None
    if extra is not None:
        extra[:, 0] = 1.0
    encoder = PromptEncoder(tokenizer, text_encoder, device)
    told = sizes and sizes.positive
    negative, *texts = (
        Conditioning.of(unet, encoder.text(text), extra_channels=extra, sizes=told) for text in ("", *PROMPTS)
    )
    for seed, text in enumerate(texts):
        noise = NoiseStream([seed], (latent_channels, side, side), device=device)
        model = checked_model(recording, unet, levels)
        denoiser = guided_denoiser(model, parameterization(schedule.config.prediction_type), text, negative, guidance)
        for _ in denoise(
            denoiser, sampler.start_scale(schedule, "trailing") * noise(), levels, sampler.step, noise=noise
        ):
            pass
    return examples
