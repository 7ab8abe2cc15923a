"""Image files as training sees them, by the reader that editing has, too; see `reading.colours`."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from latentdiff.reading.colours import as_rgb, colours_of, orientation
from latentdiff.reading.images import opened

# Only these readers are asked, whatever a file is called.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")
SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif"})
BACKGROUND = "white"


def read_image(source: Path | bytes, name: str, *, background: str = BACKGROUND) -> Image.Image:
    """Decode an image to upright RGB in sRGB, 8 bits, transparency laid on `background`; of animations the first frame.

    Args:
        source: a file, or its content.
        name: for messages.
        background: a colour as CSS names it, "white" or "#808080".

    Raises:
        DataError: it is no image, is damaged, or is larger than Pillow's limit against decompression bombs.
    """
    with opened(source, name, FORMATS) as image:
        return as_rgb(image, background, name)


def read_alpha(source: Path | bytes, name: str) -> Image.Image:
    """How opaque each pixel of an image is, as RGB of three equal channels; all white where nothing is transparent.

    Raises:
        DataError: see `read_image`.
    """
    with opened(source, name, FORMATS) as image:
        found = colours_of(image, name)
    alpha = found.alpha or Image.new("L", found.rgb.size, 255)
    return Image.merge("RGB", [alpha] * 3)


def image_size(source: Path | bytes, name: str) -> tuple[int, int]:
    """Width and height in pixels after EXIF rotation, from the header alone.

    Raises:
        DataError: it is no image.
    """
    with opened(source, name, FORMATS, whole=False) as image:
        # Pillow turns a TIFF itself, and says its size so.
        is_lying = image.format != "TIFF" and orientation(image) >= 5
        return (image.height, image.width) if is_lying else image.size
