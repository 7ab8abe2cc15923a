"""Images between the VAE's tensors, PIL, files and animations."""

from __future__ import annotations

import io
import math
import os
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any, cast

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageSequence, PngImagePlugin
from torch import Tensor

from latentdiff.errors import DataError, UsageError
from latentdiff.files import IMAGE_FORMATS, atomic_path, image_format
from latentdiff.reading.colours import as_rgb as as_rgb
from latentdiff.reading.images import MOST_FRAMES, opened
from latentdiff.reading.plain import open_file
from latentdiff.reading.texts import exif_with, texts_of

CAPTION_SIZE = 12  # pixels
QUALITY = 95  # of what JPEG, WebP and AVIF call quality
_LONGEST_SIDE = {"JPEG": 65_535, "WEBP": 16_383}  # pixels
_LONGEST_EXIF = 65_533  # bytes that one segment of a JPEG holds


def decibels(error: float, peak: float = 255.0) -> float:
    """Peak signal-to-noise ratio in dB of a mean square error, of values that span `peak`; infinite for none."""
    return math.inf if error == 0.0 else 10.0 * math.log10(peak**2 / error)


def psnr(image: Image.Image, other: Image.Image) -> float:
    """Peak signal-to-noise ratio of two RGB images in dB; 99 for equal ones, so that means are finite."""
    a, b = (np.asarray(one, dtype=np.float64) for one in (image, other))
    return min(99.0, decibels(float(np.square(a - b).mean())))


def to_pil(images: Tensor) -> list[Image.Image]:
    """Turn images (N, 3, H, W) in [-1, 1] into PIL images; values outside are clipped."""
    levels = ((images.float() / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)  # (N, 3, H, W)
    return [Image.fromarray(array) for array in levels.permute(0, 2, 3, 1).cpu().numpy()]


def to_tensor(images: Sequence[Image.Image]) -> Tensor:
    """Turn PIL images of one size into a tensor (N, 3, H, W) in [-1, 1]."""
    arrays = np.stack([np.asarray(image.convert("RGB")) for image in images])  # (N, H, W, 3)
    return torch.tensor(arrays).permute(0, 3, 1, 2).float() / 127.5 - 1  # (N, 3, H, W)


def save_image(
    image: Image.Image, path: str | os.PathLike[str], *, metadata: bool = True, quality: int = QUALITY
) -> None:
    """Write an image whole or not at all, with its recipe: PNG, JPEG, WebP or AVIF, by the ending of `path`.

    A PNG holds all texts of `image.info`; the others hold the recipe in their EXIF data (see `reading.texts`). A colour
    profile in `image.info` is kept.

    Args:
        metadata: write the recipe.
        quality: 1 to 100, of formats that lose something; colours keep their full resolution in JPEG and AVIF. A WebP
            of quality 100 loses nothing.

    Raises:
        UsageError: the format is not known, or cannot hold the image or its recipe.
        LatentDiffError: the file cannot be written.
    """
    name = image_format(path)
    if name is None:
        raise UsageError(f"cannot write {os.fspath(path)}: expected an ending of {', '.join(IMAGE_FORMATS)}")
    if name == "PNG":
        return save_png(image, path, metadata=metadata)
    has_alpha = is_transparent(image)
    if has_alpha and name == "JPEG":
        raise UsageError(
            f"cannot write {os.fspath(path)}: the image has transparent parts, which JPEG does not hold; choose .png, "
            ".webp or .avif"
        )
    if max(image.size) > _LONGEST_SIDE.get(name, max(image.size)):
        raise UsageError(
            f"cannot write {os.fspath(path)}: {name} holds {_LONGEST_SIDE[name]} pixels a side, found {image.width} x "
            f"{image.height}; choose .png"
        )
    exif = exif_with(texts_of(image)) if metadata else b""
    if name == "JPEG" and len(exif) > _LONGEST_EXIF:
        raise UsageError(
            f"cannot write {os.fspath(path)}: its recipe of {len(exif):,} bytes is longer than a JPEG holds, "
            f"{_LONGEST_EXIF:,}; choose .png, .webp or .avif, or --no-metadata"
        )
    is_grey = image.mode == "L" and name == "JPEG"
    plain = image if is_grey else image.convert("RGBA" if has_alpha else "RGB")
    _write(plain, path, name, exif=exif, icc_profile=image.info.get("icc_profile"), **_options(name, quality))


def as_stored(image: Image.Image, name: str) -> Image.Image:
    """What a file of Pillow's format `name` gives back of an RGB or RGBA image that `save_image` writes."""
    file = io.BytesIO()
    image.save(file, name, **_options(name, QUALITY))
    return Image.open(file).convert(image.mode)


def _options(name: str, quality: int) -> dict[str, Any]:
    return {
        "JPEG": {"quality": quality, "subsampling": 0, "optimize": True},
        "WEBP": {"quality": quality, "lossless": quality == 100, "exact": True},
        "AVIF": {"quality": quality, "subsampling": "4:4:4"},
    }[name]


def save_png(image: Image.Image, path: str | os.PathLike[str], *, metadata: bool = True) -> None:
    """Write a PNG whole or not at all, with the texts in `image.info` (the recipe) unless `metadata` is off.

    Raises:
        UsageError: it is no image, or the name says another format.
        LatentDiffError: the file cannot be written.
    """
    if not isinstance(image, Image.Image):  # pyright: ignore[reportUnnecessaryIsInstance] - of callers without types
        raise UsageError(f"expected an image of PIL, found {type(image).__name__}")
    if image_format(path) not in (None, "PNG"):
        raise UsageError(f"cannot write {os.fspath(path)} as PNG: end the name in .png, or take save_image")
    chunks = PngImagePlugin.PngInfo()
    for name, text in texts_of(image).items() if metadata else ():
        chunks.add_text(name, text)  # as iTXt where Latin-1 does not suffice
    _write(image, path, "PNG", pnginfo=chunks, icc_profile=image.info.get("icc_profile"))


def _write(image: Image.Image, path: str | os.PathLike[str], name: str, **options: Any) -> None:
    plain = image.convert("RGBA") if "transparency" in image.info else image.copy()
    plain.info = {}  # of which Pillow would write some
    with atomic_path(path) as temporary:
        plain.save(temporary, format=name, **options)


def is_lossy(path: str | os.PathLike[str]) -> bool:
    """Whether an image file is of a format that does not keep pixels exactly: JPEG, AVIF, and WebP but for its lossless
    kind.

    Raises:
        DataError: there is no such file.
    """
    with open_file(path, DataError) as file:
        head = file.read(12)
        if head[8:] != b"WEBP":
            return head.startswith(b"\xff\xd8") or head[4:] in (b"ftypavif", b"ftypavis")
        while len(start := file.read(8)) == 8 and start[:4] not in (b"VP8L", b"VP8 "):
            file.seek(-(-int.from_bytes(start[4:], "little") // 2) * 2, os.SEEK_CUR)
    return start[:4] != b"VP8L"


def is_transparent(image: Image.Image) -> bool:
    """Whether any pixel is not wholly opaque."""
    if not image.has_transparency_data:
        return False
    least, _ = cast(tuple[int, int], image.convert("RGBA").getchannel("A").getextrema())
    return least < 255


def gif_of(frames: Sequence[Image.Image], fps: float, comment: str = "") -> bytes:
    """An endless GIF of images of one size, in 256 colours each; times are rounded to 1/100 s."""
    file = io.BytesIO()
    duration = round(1000 / fps)
    frames[0].save(
        file, "GIF", save_all=True, append_images=frames[1:], duration=duration, loop=0, comment=comment.encode()
    )  # fmt: skip
    return file.getvalue()


def frames_of(animation: bytes | str | os.PathLike[str]) -> list[Image.Image]:
    """The frames of an animation, its bytes or a file, in RGB; of equal neighbours the encoder may have made one.

    Raises:
        DataError: there is no such file, or it is damaged or no image.
    """
    name = "the animation" if isinstance(animation, bytes) else os.fspath(animation)
    with opened(animation, name) as image:
        frames = [frame.convert("RGB") for frame in islice(ImageSequence.Iterator(image), MOST_FRAMES + 1)]
    if len(frames) > MOST_FRAMES:
        raise DataError(f"{name} has more than {MOST_FRAMES:,} frames, as bombs do; cut it")
    return frames


def open_image(path: str | os.PathLike[str], *, still: bool = False) -> Image.Image:
    """Read an image with all its texts in `info`, wherever its format keeps them; see `reading.texts`.

    Args:
        still: one image is wanted: say so if it is an animation, or has pages, of which the first is taken.

    Raises:
        DataError: there is no such file, or it is damaged or no image.
    """
    with opened(path, os.fspath(path)) as image:
        count = getattr(image, "n_frames", 1) if still and image.format != "MPO" else 1
        if count > 1:
            warnings.warn(f"{os.fspath(path)} has {count} frames or pages; the first is taken", stacklevel=2)
        image.load()
        image.info = {**texts_of(image), **image.info}
        return image


def side_by_side(images: Mapping[str, Image.Image]) -> Image.Image:
    """Images in one row, each above its name; smaller ones stand at the top left of a white area of the largest
    size."""
    size = max(image.width for image in images.values()), max(image.height for image in images.values())
    cells: list[Image.Image] = []
    for image in images.values():
        cell = Image.new("RGB", size, "white")
        cell.paste(as_rgb(image))
        cells.append(cell)
    return contact_sheet(cells, list(images), columns=len(cells))


def contact_sheet(images: Sequence[Image.Image], captions: Sequence[str], *, columns: int = 4) -> Image.Image:
    """Lay images of one size out in rows, each above its caption; captions wrap and are cut after three lines."""
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
