"""What a U-Net sees besides noisy latents and text, told by its channels."""

from __future__ import annotations

from latentdiff.errors import CheckpointError
from latentdiff.networks.config import UNetConfig

TEXT = "text"  # nothing more
INPAINTING = "inpainting"  # a mask, and the latents of the image without the masked part
INSTRUCTIONS = "instructions"  # the latents of an image to change (InstructPix2Pix, Brooks et al. 2023)
DEPTH = "depth"  # a depth map (SD 2)
VARIATIONS = "variations"  # what CLIP sees in an image (unCLIP, Ramesh et al. 2022)
UPSCALING = "upscaling"  # a small image, and how noisy it is (the x4 upscaler of SD 2)

# How strongly the text is followed where nothing else is asked for, as the authors of these models do.
GUIDANCE = {INSTRUCTIONS: 7.5, UPSCALING: 9.0}
# What a model that sees more is for; follows "this model".
NEEDS = {
    INPAINTING: "is for inpainting and needs an image and a mask",
    VARIATIONS: "makes variations of an image: latentdiff vary IMAGE --model FOLDER",
    UPSCALING: "makes images four times as large: latentdiff upscale IMAGE --model FOLDER",
    DEPTH: 'sees the depths of an image: latentdiff edit IMAGE "a wooden house"',
    INSTRUCTIONS: 'follows instructions about an image: latentdiff edit IMAGE "make it winter"',
}


def inputs_of(unet: UNetConfig, latent: int) -> str:
    """The kind of a U-Net for latents of so many channels.

    Raises:
        CheckpointError: none that is known here.
    """
    kinds = {
        latent: TEXT,
        2 * latent + 1: INPAINTING,
        2 * latent: INSTRUCTIONS,
        latent + 1: DEPTH,
        latent + 3: UPSCALING,
    }
    kind = kinds.get(unet.in_channels)
    if kind == TEXT and unet.class_dim is not None:
        return VARIATIONS
    if kind and (kind == UPSCALING) == (unet.num_class_embeds is not None):
        return kind
    expected = ", ".join(f"{count} ({kind})" for count, kind in kinds.items())
    raise CheckpointError(
        f"expected a U-Net with input channels for {latent} of latents, {expected}, and labels for {UPSCALING} alone, found "
        f"{unet.in_channels} with {unet.num_class_embeds or 'no'} labels: models that take other inputs are not supported"
    )
