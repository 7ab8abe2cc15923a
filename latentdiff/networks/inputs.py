"""What a U-Net sees besides noisy latents and text, told by its channels."""

from __future__ import annotations

from latentdiff.errors import CheckpointError
from latentdiff.networks.config import UNetConfig

TEXT = "text"  # nothing more
INPAINTING = "inpainting"  # a mask, and the latents of the image without the masked part
INSTRUCTIONS = "instructions"  # the latents of an image to change (InstructPix2Pix, Brooks et al. 2023)

# What a model that sees more is for; follows "this model".
NEEDS = {
    INPAINTING: "is for inpainting and needs an image and a mask",
    INSTRUCTIONS: 'follows instructions about an image: latentdiff edit IMAGE "make it winter"',
}


def inputs_of(unet: UNetConfig, latent: int) -> str:
    """The kind of a U-Net for latents of so many channels.

    Raises:
        CheckpointError: none that is known here.
    """
    kinds = {latent: TEXT, 2 * latent + 1: INPAINTING, 2 * latent: INSTRUCTIONS}
    if unet.in_channels in kinds:
        return kinds[unet.in_channels]
    others = {latent + 1: "the depth model of SD 2", latent + 3: "the x4 upscaler of SD 2"}
    name = f", as {others[unet.in_channels]} has them" if unet.in_channels in others else ""
    expected = ", ".join(f"{count} ({kind})" for count, kind in kinds.items())
    raise CheckpointError(
        f"expected a U-Net with input channels for {latent} of latents, {expected}, found {unet.in_channels}{name}: models "
        "that take other inputs are not supported"
    )
