"""Pictures between the VAE's tensors, PIL and PNG files."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, PngImagePlugin
from torch import Tensor

from latentdiff.errors import DataError
from latentdiff.files import atomic_path


def to_pil(images: Tensor) -> list[Image.Image]:
    """Turn images (N, 3, H, W) in [-1, 1] into PIL images; values outside are clipped."""
    levels = ((images.float() / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)  # (N, 3, H, W)
    return [Image.fromarray(array) for array in levels.permute(0, 2, 3, 1).cpu().numpy()]


def to_tensor(images: Sequence[Image.Image]) -> Tensor:
    """Turn PIL images of one size into a tensor (N, 3, H, W) in [-1, 1]."""
    arrays = np.stack([np.asarray(image.convert("RGB")) for image in images])  # (N, H, W, 3)
    return torch.from_numpy(arrays).permute(0, 3, 1, 2).float() / 127.5 - 1  # (N, 3, H, W)


def save_png(image: Image.Image, path: str | os.PathLike[str], *, metadata: bool = True) -> None:
    """Write a PNG whole or not at all, with the text in `image.info` (the recipe) unless `metadata` is off."""
    chunks = PngImagePlugin.PngInfo()
    if metadata:
        for name, text in image.info.items():
            if isinstance(text, str):
                chunks.add_text(name, text)  # as iTXt where Latin-1 does not suffice
    plain = image.copy()
    plain.info = {}
    with atomic_path(path) as temporary:
        plain.save(temporary, format="PNG", pnginfo=chunks)


def open_image(path: str | os.PathLike[str]) -> Image.Image:
    """Read a picture with its text chunks.

    Raises:
        DataError: there is no such file, or it is damaged or no picture.
    """
    try:
        with Image.open(path) as image:
            image.load()
            return image
    except FileNotFoundError as error:
        raise DataError(f"no picture at {os.fspath(path)}") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"cannot read {os.fspath(path)} as a picture: {error}") from error
