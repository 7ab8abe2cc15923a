"""Images enlarged between two passes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image

from latentdiff.networks.upscaling.model import Upscaler
from latentdiff.request.second_pass import SecondPass


def enlarged(
    images: Sequence[Image.Image], asked: SecondPass, size: tuple[int, int], device: torch.device
) -> list[Image.Image]:
    """Images at another width and height: by the file of an upscaler, of whose factor Lanczos makes the one asked for, or
    by Lanczos alone.

    Raises:
        CheckpointError: the file is no upscaler.
    """
    if asked.is_by_file:
        upscaler = Upscaler.load(asked.hires_upscaler, device=device)
        images = [upscaler(image) for image in images]
    return [image if image.size == size else image.resize(size, Image.Resampling.LANCZOS) for image in images]
