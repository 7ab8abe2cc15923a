"""Image files from anywhere, by Pillow: only formats that are images, of bounded size, and no exception but ours."""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from PIL import Image, UnidentifiedImageError

from latentdiff.errors import DataError
from latentdiff.reading.plain import MIB, open_file

# Other readers of Pillow start programs (EPS), read what is no image, or ask the network.
FORMATS = (
    "PNG", "JPEG", "MPO", "WEBP", "BMP", "DIB", "TIFF", "GIF", "AVIF", "PPM", "TGA", "ICO", "JPEG2000", "PSD", "PCX",
)  # fmt: skip
MOST_FRAMES = 10_000  # of an animation
# What Pillow's readers raise on damaged files.
DAMAGED = (
    OSError, SyntaxError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, EOFError, MemoryError,
    AssertionError, RecursionError, NotImplementedError, RuntimeError, struct.error, zlib.error,
    Image.DecompressionBombError,
)  # fmt: skip


@contextmanager
def opened(
    source: bytes | str | os.PathLike[str], name: str, formats: Sequence[str] = FORMATS, *, whole: bool = True
) -> Iterator[Image.Image]:
    """An image, not decoded yet; whatever goes wrong with it inside the `with` is an error of ours.

    Args:
        source: a file, or its content.
        name: for messages.
        whole: False where the header alone is wanted: checksums are not compared then.

    Raises:
        DataError: there is no such file, or it is damaged, no image, or larger than Pillow's limit against
            decompression bombs.
    """
    if not isinstance(source, bytes) and not Path(source).exists():
        raise DataError(f"no image at {name}")
    with io.BytesIO(source) if isinstance(source, bytes) else open_file(source, DataError) as file:
        try:
            if whole:
                check_png(file)
            with _open(file, formats) as image:
                yield image
        except DataError:
            raise
        except DAMAGED as error:
            raise DataError(f"cannot read {name} as an image: {_reason(file, formats, error)}") from error


def _reason(file: BinaryIO, formats: Sequence[str], error: BaseException) -> str:
    if isinstance(error, Image.DecompressionBombError):
        return (
            f"it has more than {2 * (Image.MAX_IMAGE_PIXELS or 0):,} pixels, as decompression bombs do; scale it down"
        )
    if not isinstance(error, UnidentifiedImageError):
        return getattr(error, "strerror", None) or str(error) or type(error).__name__
    file.seek(0)
    start = file.read(40)
    if not start:
        return "the file is empty"
    if start.lstrip()[:1] == b"<":
        return "it is a web page"
    if start.startswith(b"version https://git-lfs"):
        return "it is a pointer of Git LFS; fetch the files with git lfs pull"
    if start.isascii() and b"\0" not in start:
        return f"it is a text file that begins with {start[:20].decode('ascii')!r}"
    if start.startswith((b"II*\0", b"MM\0*")):
        return "it is a TIFF with pixels of a kind that is not read, such as several floats each; save it with 8 or 16 bits"
    if start[4:8] == b"ftyp":
        return "it is a HEIC, a video or the like; save it as JPEG or PNG"
    return f"it is none of {', '.join(formats)}, or its start is damaged"


def check_png(file: BinaryIO) -> None:
    """Compare the checksums of a PNG's parts, which Pillow does not for the pixels; other files pass.

    Raises:
        ValueError: one is wrong.
    """
    if file.read(8) == b"\x89PNG\r\n\x1a\n":
        while len(start := file.read(8)) == 8:
            length = int.from_bytes(start[:4], "big")
            found = zlib.crc32(start[4:])
            while length and (data := file.read(min(length, MIB))):
                found, length = zlib.crc32(data, found), length - len(data)
            stored = file.read(4)
            if not length and len(stored) == 4 and int.from_bytes(stored, "big") != found:
                raise ValueError(f"the checksum of its part {start[4:].decode('latin1')!r} is wrong")
            if start[4:] == b"IEND":
                break
    file.seek(0)


def _open(file: BinaryIO, formats: Sequence[str]) -> Image.Image:
    """The common formats first: the readers of the others take a while to load."""
    Image.preinit()
    try:
        return Image.open(file, formats=[name for name in formats if name in Image.OPEN])
    except UnidentifiedImageError:
        Image.init()
        file.seek(0)
        return Image.open(file, formats=[name for name in formats if name in Image.OPEN])
