"""Images of what the model expects while it is still at work, by the VAE or by a tiny decoder that takes no time."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from latentdiff.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from latentdiff.diffusion.denoise import Callback
    from latentdiff.pipeline import Pipeline

    # Latents (N, C, h, w) -> images (N, 3, H, W), about in [-1, 1].
    Decode = Callable[[Tensor], Tensor]


class PreviewFile:
    """A callback for pipelines that writes the image expected so far; several on one sheet.

    Args:
        path: an image file, written again each time.
        decode: `Pipeline.decode`, or a tiny decoder.
        every: steps from one preview to the next.

    Raises:
        UsageError: `every` is below 1.
    """

    def __init__(self, path: str | os.PathLike[str], decode: Decode, *, every: int = 5) -> None:
        if every < 1:
            raise UsageError(f"expected a preview every 1 step or more, found {every}")
        self._path, self._decode, self._every = Path(path), decode, every

    def __call__(self, step: int, t: float, x0: Tensor) -> None:
        """See `latentdiff.diffusion.denoise.Callback`."""
        from latentdiff.image import contact_sheet, save_image, to_pil

        if step % self._every == 0:
            images = to_pil(self._decode(x0))
            save_image(images[0] if len(images) == 1 else contact_sheet(images, [""] * len(images)), self._path)


def preview_file(pipe: Pipeline, path: Path, every: int, decoder: Path | None) -> Callback:
    """What writes previews to `path`, by the tiny decoder in that file or else by the model's VAE."""
    if decoder is None:
        return PreviewFile(path, pipe.decode, every=every)
    from latentdiff.checkpoints.tiny_vae import check_decoder_fits, load_tiny_decoder

    tiny = load_tiny_decoder(decoder)
    check_decoder_fits(tiny, pipe.vae.config)
    tiny = tiny.to(pipe.device)
    return PreviewFile(path, lambda latents: tiny(latents.to(pipe.device).float()), every=every)
