"""What one training step computes: a batch of images or latents and captions -> the loss."""

from __future__ import annotations

import contextlib

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F

from latentdiff.networks.controlnet import ControlNetwork
from latentdiff.networks.layers import SizedText
from latentdiff.networks.pooled import joined_chunks
from latentdiff.networks.text_encoder import TextEncoder
from latentdiff.networks.text_encoders import TextEncoders
from latentdiff.networks.unet import UNet
from latentdiff.networks.vae import VAE, LatentDistribution
from latentdiff.training.data.transforms import to_signed, to_unsigned
from latentdiff.training.dropout import Dropout
from latentdiff.training.objective import DiffusionObjective, masked_mean
from latentdiff.training.sections import DenoisingSection

# Latents of up to this many entries a channel are attended to faster without PyTorch's fused kernels, on a CPU in
# bfloat16.
_SMALL_LATENT = 32 * 32

# The encoder works on so many pixels at once: its activations would be the peak of the whole step.
_PIXELS_AT_ONCE = 512 * 512


class DenoisingLoss(nn.Module):
    """U-Net and text encoder with their training loss.

    Attributes:
        measure: the name, in `measured`, of what is to fall on held-out images.

    Args:
        unet, text_encoder: the model; what of it is trained has `requires_grad`.
        objective: noise levels, target and weights.
        vae: encodes the images of batches that bring images; None where all latents are cached.
        adapter: what is trained beside the model (a LoRA, the embedding of a word), so that it is part of this module.
        control: a ControlNet that is trained beside the U-Net and follows the batch's `hints`.
        trains_text: whether gradients must reach through the text encoder.
        dropout: what the adapter leaves out in `forward`, where batches have `rows`.
    """

    measure = "mse"

    def __init__(
        self,
        unet: UNet,
        text_encoder: TextEncoder,
        objective: DiffusionObjective,
        *,
        vae: VAE | None = None,
        adapter: nn.Module | None = None,
        control: ControlNetwork | None = None,
        trains_text: bool = False,
        dropout: Dropout | None = None,
    ) -> None:
        super().__init__()
        self._trains_text, self.dropout = trains_text, dropout
        self.unet, self.text_encoder, self.objective = unet, text_encoder, objective
        self.vae, self.adapter, self.control = vae, adapter, control
        self._grey: dict[tuple[int, int], Tensor] = {}  # latents of a grey image, by their height and width

    def forward(self, batch: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        """Weighted loss and plain mean squared error.

        Args:
            batch: `noise` (n, C, h, w), `timesteps` (n,), `weights` (n,); `latents` (n, C, h, w), or `images`
                (n, H, W, 3) uint8 with `posterior` noise (n, C, h, w); `context` (n, L, width), or `tokens` (n, chunks,
                L); for U-Nets that are told them, `sizes` (n, 6); for a ControlNet `hints` (n, H, W, 3) uint8; `masks`
                (n, 1, h, w), where errors do not count the same everywhere; for a model for inpainting `holes` (n, 1, H, W)
                bool, `images`, and `seen_noise` (n, C, h, w) to draw the latents of what is left with. To be kept as it
                was: `old_x` (k, C, h, w) noisy, `old_timesteps` (k,), `old_raw` (k, C, h, w), `old_weights` (k,), and
                with `old_` before their names what the U-Net is told there. With `dropout`, `rows` (n,), the
                places in the batch of the step.
        """
        with contextlib.nullcontext() if self.dropout is None else self.dropout.drawing(step, batch["rows"]):
            parts = self.learned(batch)
        if "old_x" in batch:
            parts["old"] = self._changes(batch) / len(batch["timesteps"])
            parts["loss"] = parts["loss"] + parts["old"]
        return parts

    def learned(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The loss of what is learned, as means over the batch: "loss", and parts to log."""
        timesteps, differences = batch["timesteps"], self.differences(batch)
        costs = masked_mean(self.objective.costs(differences, timesteps), batch.get("masks"))
        weights = self.objective.weights(timesteps) * batch["weights"]
        squares = masked_mean(differences.detach().square(), batch.get("masks"))
        return {"loss": (weights * costs).mean(), "mse": squares.mean()}

    def _changes(self, batch: dict[str, Tensor]) -> Tensor:
        """The weighted sum of the mean squares of what is predicted otherwise than before."""
        old = {name.removeprefix("old_"): tensor for name, tensor in batch.items() if name.startswith("old_")}
        now = self.prediction(old["x"], old["timesteps"], old).float()
        return (old["weights"] * (now - old["raw"]).square().flatten(1).mean(1)).sum()

    def latents(self, batch: dict[str, Tensor]) -> Tensor:
        """Latents (n, C, h, w) in float32, drawn from the images' distributions."""
        if "latents" in batch:
            return batch["latents"]
        return encode_images(self.vae, batch["images"]).sample(batch["posterior"])

    def context(self, batch: dict[str, Tensor]) -> Tensor | SizedText:
        """Text embeddings (n, chunks L, width), with sizes if there are some."""
        text = self.text(batch).to(self.unet.conv_in.weight.dtype)
        return SizedText(text, batch["sizes"]) if "sizes" in batch else text

    def text(self, batch: dict[str, Tensor]) -> Tensor:
        """Text embeddings (n, chunks L, width): those of the batch, or of its tokens."""
        if "context" in batch:
            return batch["context"]
        with torch.set_grad_enabled(self._trains_text and torch.is_grad_enabled()):
            return encode_tokens(self.text_encoder, batch["tokens"])

    def measured(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """What is measured on held-out images, (n,) each."""
        return {"mse": self.errors(batch)}

    def errors(self, batch: dict[str, Tensor]) -> Tensor:
        """Mean squared error of each sample, (n,); see `forward`."""
        return masked_mean(self.differences(batch).square(), batch.get("masks"))

    def differences(self, batch: dict[str, Tensor]) -> Tensor:
        """What the predictions are off by, (n, C, h, w) float32."""
        latents, noise, timesteps = self.latents(batch), batch["noise"], batch["timesteps"]
        prediction = self.prediction(self.objective.noisy(latents, noise, timesteps), timesteps, batch)
        return self.objective.differences(prediction, latents, noise, timesteps)

    def prediction(self, noisy: Tensor, timesteps: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """What the U-Net says about noisy latents (n, C, h, w) float32, in its own precision.

        Args:
            batch: what it is told: `context` or `tokens`, and perhaps `sizes`, `hints` and `holes`; see `forward`. A model
                for inpainting that is told of no hole sees nothing of an image.
        """
        context, dtype = self.context(batch), self.unet.conv_in.weight.dtype
        noisy = self._with_hole(noisy, batch).to(dtype).contiguous(memory_format=torch.channels_last)
        return self.unet(noisy, timesteps, context, self._residuals(noisy, timesteps, context, batch))

    def _with_hole(self, noisy: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """Noisy latents (n, C, h, w); in front of a U-Net for inpainting with the mask and the latents of what is left of
        the image behind them, (n, 2 C + 1, h, w), in the order of diffusers' StableDiffusionInpaintPipeline."""
        if self.unet.config.in_channels == noisy.shape[1]:
            return noisy
        assert self.vae is not None
        factor = self.vae.config.downscale
        if "holes" in batch:
            holes = batch["holes"].float()
            seen = encode_pixels(self.vae, to_signed(batch["images"]) * (1 - holes)).sample(batch["seen_noise"])
        else:
            count, _, height, width = noisy.shape
            holes = noisy.new_ones(count, 1, factor * height, factor * width, dtype=torch.float32)
            if (height, width) not in self._grey:
                grey = torch.zeros_like(holes[:1]).expand(-1, 3, -1, -1)
                self._grey[height, width] = encode_pixels(self.vae, grey).mode()
            seen = self._grey[height, width].expand(count, -1, -1, -1)
        # A cell with any pixel to be painted is painted, as in generation.
        return torch.cat([noisy, F.max_pool2d(holes, factor), seen], 1)

    def _residuals(
        self, noisy: Tensor, timesteps: Tensor, context: Tensor | SizedText, batch: dict[str, Tensor]
    ) -> list[Tensor] | None:
        """What the ControlNet adds to the skips; it computes in its own precision, that of what is trained."""
        if self.control is None:
            return None
        own, dtype = self.control.conv_in.weight.dtype, noisy.dtype
        text = SizedText(context.text.to(own), context.sizes) if isinstance(context, SizedText) else context.to(own)
        hint = self.control.embed_hint(to_unsigned(batch["hints"]).to(own))
        return [one.to(dtype) for one in self.control(noisy.to(own), timesteps, text, hint)]


def encode_images(vae: VAE, images: Tensor) -> LatentDistribution:
    """Images (n, H, W, 3) uint8 -> the distributions of their latents (n, C, h, w), float32."""
    return encode_pixels(vae, to_signed(images))


@torch.no_grad()
def encode_pixels(vae: VAE, images: Tensor) -> LatentDistribution:
    """Images (n, 3, H, W) in [-1, 1] -> the distributions of their latents (n, C, h, w), float32."""
    dtype, kind = vae.quant_conv.weight.dtype, images.device.type
    half = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.float16
    # The activations of SD's encoder do not fit into float16; bfloat16 has the range of float32.
    with torch.autocast(kind, enabled=False) if half else contextlib.nullcontext():
        at_once = max(1, _PIXELS_AT_ONCE // (images.shape[2] * images.shape[3]))
        parts = [vae.encode(part.to(dtype)) for part in images.split(at_once)]
    return LatentDistribution(
        torch.cat([part.mean for part in parts]).float(), torch.cat([part.logvar for part in parts]).float()
    )


def encode_tokens(text_encoder: TextEncoder, tokens: Tensor) -> Tensor:
    """Token ids (n, chunks, L) -> embeddings (n, chunks L, width): each chunk is read alone.

    Of SDXL's text encoders they have a row more, see `networks.pooled`.
    """
    found = text_encoder(tokens.flatten(0, 1)).unflatten(0, tokens.shape[:2])  # (n, chunks, L, width)
    return joined_chunks(list(found.unbind(1)), pooled=isinstance(text_encoder, TextEncoders))


def attention_backend(settings: DenoisingSection, side: float, accelerator: Accelerator) -> str:
    """The back end that `settings` ask for; `side` is that of the latents."""
    if settings.attention != "auto":
        return settings.attention
    few = side**2 <= _SMALL_LATENT and accelerator.mixed_precision == "bf16"
    return "plain" if accelerator.device.type == "cpu" and few else "auto"
