"""Pictures of what the model expects while it is still at work, by the VAE or by a tiny decoder that takes no time.

The tiny decoder is the one of TAESD (Bohan 2023), which is published for Stable Diffusion as
`taesd_decoder.safetensors`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from latentdiff.checkpoints.files import read_tensors
from latentdiff.errors import CheckpointError, UsageError
from latentdiff.image import contact_sheet, save_png, to_pil
from latentdiff.networks.config import VAEConfig

WIDTH = 64  # channels of all layers
FACTOR = 8  # pixels per latent along one side

# Latents (N, C, h, w) -> pictures (N, 3, H, W), about in [-1, 1].
Decode = Callable[[Tensor], Tensor]


class TinyDecoder(nn.Sequential):
    """Latents as the VAE here takes them, of unit variance, to pictures 8 times as high and wide.

    The layers are named by their places, as in the published file.
    """

    def __init__(self, latent_channels: int = 4) -> None:
        layers: list[nn.Module] = [_SoftClamp(), nn.Conv2d(latent_channels, WIDTH, 3, padding=1), nn.ReLU()]
        for _ in range(3):
            layers += [_Block(), _Block(), _Block(), nn.Upsample(scale_factor=2), _convolution(bias=False)]
        super().__init__(*layers, _Block(), nn.Conv2d(WIDTH, 3, 3, padding=1))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> TinyDecoder:
        """Read a file of the published layout.

        Raises:
            CheckpointError: there is none, it is damaged, or holds something else.
        """
        if not Path(path).is_file():
            raise CheckpointError(f"expected a tiny decoder at {path}, found no file")
        tensors = read_tensors(Path(path)).tensors
        first = tensors.get("1.weight")
        decoder = cls(first.shape[1] if first is not None and first.ndim == 4 else 4)
        try:
            decoder.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, strict=True)
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            raise CheckpointError(
                f"{path} is no tiny decoder in the layout of taesd_decoder.safetensors: {reason}"
            ) from error
        return decoder.eval()

    def check_fit(self, vae: VAEConfig) -> None:
        """Raise a CheckpointError if the latents of a model with this VAE are not what the decoder takes."""
        found, expected = (self[1].in_channels, FACTOR), (vae.latent_channels, vae.downscale)
        if found != expected:
            raise CheckpointError(
                f"expected a tiny decoder for latents of {expected[0]} channels, {expected[1]} times smaller than the picture, "
                f"found one for {found[0]} channels, {found[1]} times smaller; leave it out to preview with the VAE"
            )

    @torch.no_grad()
    def forward(self, latents: Tensor) -> Tensor:
        """(N, C, h, w) -> (N, 3, 8 h, 8 w), about in [-1, 1], float32."""
        return super().forward(latents.to(self[1].weight)) * 2.0 - 1.0


class _SoftClamp(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 3.0 * torch.tanh(x / 3.0)


class _Block(nn.Module):
    """Three convolutions beside the identity."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Sequential(_convolution(), nn.ReLU(), _convolution(), nn.ReLU(), _convolution())

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.conv(x) + x)


def _convolution(*, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(WIDTH, WIDTH, 3, padding=1, bias=bias)


class PreviewFile:
    """A callback for pipelines that writes the picture expected so far; several on one sheet.

    Args:
        path: a PNG file, written anew each time.
        decode: `Pipeline.decode`, or a `TinyDecoder`.
        every: steps from one preview to the next.

    Raises:
        UsageError: `every` is below 1.
    """

    def __init__(self, path: str | os.PathLike[str], decode: Decode, *, every: int = 5) -> None:
        if every < 1:
            raise UsageError(f"expected a preview every 1 step or more, found {every}")
        self._path, self._decode, self._every = Path(path), decode, every

    def __call__(self, step: int, t: float, x0: Tensor) -> None:
        """See `latentdiff.diffusion.progress.Callback`."""
        if step % self._every == 0:
            images = to_pil(self._decode(x0))
            save_png(images[0] if len(images) == 1 else contact_sheet(images, [""] * len(images)), self._path)
