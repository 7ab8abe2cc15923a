"""Images that something starts from, and what recipes say about them."""

from __future__ import annotations

import hashlib
import os
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from latentdiff.checkpoints.hashing import file_hash
from latentdiff.image import open_image
from latentdiff.reading.colours import Colours, colours_of
from latentdiff.reading.images import opened


@dataclass(frozen=True)
class Source:
    """An image as it came, and its entry in a recipe: {"file": name, "sha256": ...}."""

    image: Image.Image
    entry: dict[str, str]

    @property
    def name(self) -> str:
        """For messages."""
        return self.entry["file"] or "the image"

    def colours(self) -> Colours:
        """Upright, in sRGB, 8 bits.

        Raises:
            DataError: see `colours_of`.
        """
        return colours_of(self.image, self.name)

    def opaque(self) -> Image.Image:
        """The same on white, RGB, for tasks whose results have no transparency; they say so."""
        colours = self.colours()
        if colours.alpha is not None:
            warnings.warn(f"the transparent parts of {self.name} are laid on white", stacklevel=2)
        return colours.on("white")


ImageInput = Image.Image | str | os.PathLike[str] | Source


def open_source(image: ImageInput) -> Source:
    """Read an image from a file, or take one of Pillow; that one is known by the hash of its pixels and has no name.
    What was opened before stays as it is.

    Raises:
        DataError: there is no such file, or it is no image.
    """
    if isinstance(image, Source):
        return image
    if isinstance(image, Image.Image):
        return Source(image, {"file": "", "sha256": _hash_of_pixels(image)})
    opened_image = open_image(image, still=True)
    return Source(opened_image, {"file": Path(image).name, "sha256": file_hash(Path(image))})


def source_of(file: bytes, name: str) -> Source:
    """The image whose file has this content, under the name that recipes are to call it.

    Raises:
        DataError: it is no image.
    """
    with opened(file, name) as image:
        image.load()
    return Source(image, {"file": name, "sha256": hashlib.sha256(file).hexdigest()})


def is_the_one(path: Path, sha256: str) -> bool:
    """Whether the file is the source of a recipe: the same file, or an image of the same pixels.

    Raises:
        DataError: it is neither that file nor an image.
    """
    return file_hash(path) == sha256 or _hash_of_pixels(open_image(path)) == sha256


def extended(image: Image.Image, factor: int) -> Image.Image:
    """The image with its last column and row repeated until both sides are multiples of `factor`."""
    right, bottom = -image.width % factor, -image.height % factor
    if not right and not bottom:
        return image
    return Image.fromarray(np.pad(np.asarray(image), ((0, bottom), (0, right), (0, 0)), mode="edge"))


def _hash_of_pixels(image: Image.Image) -> str:
    digest = hashlib.sha256(f"{image.mode} {image.width}x{image.height} ".encode())
    digest.update(image.tobytes())
    return digest.hexdigest()
