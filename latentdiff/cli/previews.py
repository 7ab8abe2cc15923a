"""Pictures of what is being made, for the commands that show them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from latentdiff.diffusion.progress import Callback
    from latentdiff.pipeline import Pipeline


def preview_file(pipe: Pipeline, path: Path, every: int, decoder: Path | None) -> Callback:
    """What writes previews to `path`, by the tiny decoder in that file or else by the model's VAE."""
    from latentdiff.cli.tiny_decoder import PreviewFile, TinyDecoder

    if decoder is None:
        return PreviewFile(path, pipe.decode, every=every)
    tiny = TinyDecoder.load(decoder)
    tiny.check_fit(pipe.vae.config)
    return PreviewFile(path, tiny.to(pipe.device), every=every)
