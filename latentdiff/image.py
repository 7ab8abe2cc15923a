"""Pictures between the VAE's tensors, PIL, PNG files and animations."""

from __future__ import annotations

import io
import math
import os
import textwrap
from collections.abc import Mapping, Sequence
from itertools import islice

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps, ImageSequence, PngImagePlugin
from torch import Tensor

from latentdiff.errors import DataError
from latentdiff.files import atomic_path
from latentdiff.reading.pictures import MOST_FRAMES, opened

CAPTION_SIZE = 12  # pixels


def decibels(error: float, peak: float = 255.0) -> float:
    """Peak signal-to-noise ratio in dB of a mean square error, of values that span `peak`; infinite for none."""
    return math.inf if error == 0.0 else 10.0 * math.log10(peak**2 / error)


def to_pil(images: Tensor) -> list[Image.Image]:
    """Turn images (N, 3, H, W) in [-1, 1] into PIL images; values outside are clipped."""
    levels = ((images.float() / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)  # (N, 3, H, W)
    return [Image.fromarray(array) for array in levels.permute(0, 2, 3, 1).cpu().numpy()]


def to_tensor(images: Sequence[Image.Image]) -> Tensor:
    """Turn PIL images of one size into a tensor (N, 3, H, W) in [-1, 1]."""
    arrays = np.stack([np.asarray(image.convert("RGB")) for image in images])  # (N, H, W, 3)
    return torch.tensor(arrays).permute(0, 3, 1, 2).float() / 127.5 - 1  # (N, 3, H, W)


def save_png(image: Image.Image, path: str | os.PathLike[str], *, metadata: bool = True) -> None:
    """Write a PNG whole or not at all, with the text in `image.info` (the recipe) unless `metadata` is off."""
    chunks = PngImagePlugin.PngInfo()
    if metadata:
        for name, text in image.info.items():
            if isinstance(name, str) and isinstance(text, str):
                chunks.add_text(name, text)  # as iTXt where Latin-1 does not suffice
    plain = image.copy()
    plain.info = {}
    with atomic_path(path) as temporary:
        plain.save(temporary, format="PNG", pnginfo=chunks)


def gif_of(frames: Sequence[Image.Image], fps: float, comment: str = "") -> bytes:
    """An endless GIF of pictures of one size, in 256 colours each; times are rounded to 1/100 s."""
    file = io.BytesIO()
    duration = round(1000 / fps)
    frames[0].save(
        file, "GIF", save_all=True, append_images=frames[1:], duration=duration, loop=0, comment=comment.encode()
    )  # fmt: skip
    return file.getvalue()


def frames_of(animation: bytes | str | os.PathLike[str]) -> list[Image.Image]:
    """The frames of an animation, its bytes or a file, in RGB; of equal neighbours the encoder may have made one.

    Raises:
        DataError: there is no such file, or it is damaged or no picture.
    """
    name = "the animation" if isinstance(animation, bytes) else os.fspath(animation)
    with opened(animation, name) as image:
        frames = [frame.convert("RGB") for frame in islice(ImageSequence.Iterator(image), MOST_FRAMES + 1)]
    if len(frames) > MOST_FRAMES:
        raise DataError(f"{name} has more than {MOST_FRAMES:,} frames, as bombs do; cut it")
    return frames


def open_image(path: str | os.PathLike[str]) -> Image.Image:
    """Read a picture with its text chunks.

    Raises:
        DataError: there is no such file, or it is damaged or no picture.
    """
    with opened(path, os.fspath(path)) as image:
        image.load()
        return image


def as_rgb(image: Image.Image) -> Image.Image:
    """A picture as the model sees it: upright (EXIF), 8-bit RGB, transparency laid over white."""
    image = as_8_bit(ImageOps.exif_transpose(image))
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("RGB")


def as_8_bit(image: Image.Image) -> Image.Image:
    """A grey picture of 16 bits or more with 8, where Pillow would clip; others as they are."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        values = np.asarray(image).astype(np.float64)  # (H, W)
        largest = 65535.0 if image.mode.startswith("I;16") or values.max() > 255.0 else 255.0
        return Image.fromarray((values * (255.0 / largest)).round().clip(0, 255).astype(np.uint8))
    return image


def side_by_side(pictures: Mapping[str, Image.Image]) -> Image.Image:
    """Pictures in one row, each above its name; smaller ones stand at the top left of a white area of the largest
    size."""
    size = max(image.width for image in pictures.values()), max(image.height for image in pictures.values())
    cells: list[Image.Image] = []
    for picture in pictures.values():
        cell = Image.new("RGB", size, "white")
        cell.paste(as_rgb(picture))
        cells.append(cell)
    return contact_sheet(cells, list(pictures), columns=len(cells))


def contact_sheet(images: Sequence[Image.Image], captions: Sequence[str], *, columns: int = 4) -> Image.Image:
    """Lay pictures of one size out in rows, each above its caption; captions wrap and are cut after three lines."""
    font = ImageFont.load_default(CAPTION_SIZE)
    width, height = images[0].size
    cell_width, cell_height = width + CAPTION_SIZE, height + 5 * CAPTION_SIZE
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (min(columns, len(images)) * cell_width, rows * cell_height), "white")
    draw = ImageDraw.Draw(sheet)
    for index, (image, caption) in enumerate(zip(images, captions, strict=True)):
        left = index % columns * cell_width + CAPTION_SIZE // 2
        top = index // columns * cell_height + CAPTION_SIZE // 2
        sheet.paste(image, (left, top))
        letters = max(1, int(width / draw.textlength("n", font=font)))
        text = "\n".join(textwrap.wrap(caption, letters, max_lines=3, placeholder=" …"))
        draw.multiline_text((left, top + height + 2), text, fill="black", font=font, spacing=2)
    return sheet
