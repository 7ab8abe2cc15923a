"""Image files as training sees them: upright, in sRGB, 8 bits, transparency on one stated colour."""

from __future__ import annotations

import io
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageCms, UnidentifiedImageError

from latentdiff.errors import DataError
from latentdiff.reading.pictures import DAMAGED, check_png
from latentdiff.reading.plain import open_file

# Only these readers are asked, whatever a file is called: others start programs (EPS) or read what is no picture.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")
SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif"})
BACKGROUND = "white"

_ORIENTATION = 0x0112  # EXIF tag; what each value asks for to stand upright (CIPA DC-008, 4.6.5)
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def read_image(source: Path | bytes, name: str, *, background: str = BACKGROUND) -> Image.Image:
    """Decode an image to RGB, 8 bits.

    EXIF rotation is applied, transparency is laid on `background`, 16-bit grey is scaled to 8 bits, and colours with
    an embedded profile (CMYK, wide gamut) are converted to sRGB. Of animations it is the first frame.

    Args:
        source: a file, or its content.
        name: for messages.
        background: a colour as CSS names it, "white" or "#808080".

    Raises:
        DataError: it is no image, is damaged, or is larger than Pillow's limit against decompression bombs.
    """
    try:
        with _bytes_of(source) as content:
            check_png(content)
            file = Image.open(content, formats=FORMATS)
            orientation = _orientation(file)
            image = _to_rgb(file, background)
    except DAMAGED as error:
        raise DataError(f"cannot read the image {name}: {_reason(source, error)}") from error
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image


def image_size(source: Path | bytes, name: str) -> tuple[int, int]:
    """Width and height in pixels after EXIF rotation, from the header alone.

    Raises:
        DataError: it is no image.
    """
    try:
        with _bytes_of(source) as content, Image.open(content, formats=FORMATS) as file:
            width, height = file.size
            return (height, width) if _orientation(file) >= 5 else (width, height)
    except DAMAGED as error:
        raise DataError(f"cannot read the image {name}: {_reason(source, error)}") from error


def _bytes_of(source: Path | bytes) -> BinaryIO:
    return io.BytesIO(source) if isinstance(source, bytes) else open_file(source, DataError)


def _orientation(image: Image.Image) -> int:
    try:
        # Of the base class: that of PNG files decodes the whole image to look behind it.
        return int(Image.Image.getexif(image).get(_ORIENTATION, 1))
    except DAMAGED:
        return 1  # broken EXIF data in a sound image are common


def _to_rgb(image: Image.Image, background: str) -> Image.Image:
    image.load()
    profile = image.info.get("icc_profile")
    if image.mode.startswith("I"):
        return _from_16_bits(image)
    if image.mode == "F":
        raise ValueError("it holds floating-point numbers; save it with 8 or 16 bits")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        flat = Image.alpha_composite(Image.new("RGBA", layer.size, background), layer).convert("RGB")
        return _to_srgb(flat, profile)
    return _to_srgb(image, profile) if image.mode in ("RGB", "CMYK") else image.convert("RGB")


def _from_16_bits(image: Image.Image) -> Image.Image:
    levels = np.asarray(image).astype(np.float64)  # (H, W)
    if levels.min(initial=0) < 0 or levels.max(initial=0) > 65535:
        raise ValueError("it holds 32-bit numbers; save it with 8 or 16 bits")
    return Image.fromarray((levels / 257).round().astype(np.uint8)).convert("RGB")


def _to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    if profile:
        try:
            given = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            if "sRGB" in ImageCms.getProfileDescription(given):
                return image.convert("RGB")
            converted = ImageCms.profileToProfile(image, given, ImageCms.createProfile("sRGB"), outputMode="RGB")
            if converted is not None:
                return converted
        except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
            pass  # a profile that is broken or made for another kind of image
    return image.convert("RGB")


def _reason(source: Path | bytes, error: BaseException) -> str:
    if isinstance(error, Image.DecompressionBombError):
        return (
            f"it has more than {2 * (Image.MAX_IMAGE_PIXELS or 0):,} pixels, as decompression bombs do; scale it down"
        )
    if not isinstance(error, UnidentifiedImageError):
        return getattr(error, "strerror", None) or str(error) or type(error).__name__
    if not (start := _start(source)):
        return "the file is empty"
    if start.lstrip()[:1] == b"<":
        return "it is a web page"
    if start.startswith(b"version https://git-lfs"):
        return "it is a pointer of Git LFS; fetch the files with git lfs pull"
    if start.isascii() and b"\0" not in start:
        return f"it is a text file that begins with {start[:20].decode('ascii')!r}"
    return f"it is none of {', '.join(FORMATS)}"


def _start(source: Path | bytes) -> bytes:
    if isinstance(source, bytes):
        return source[:40]
    with open(source, "rb") as file:
        return file.read(40)
