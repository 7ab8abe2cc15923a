"""The pictures that a task starts from, and what recipes say about them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from latentdiff.errors import DataError
from latentdiff.image import open_image

Picture = Image.Image | str | os.PathLike[str]


@dataclass(frozen=True)
class Source:
    """A picture as it came, and its entry in a recipe: {"file": name, "sha256": ...}."""

    image: Image.Image
    entry: dict[str, str]


def open_source(picture: Picture) -> Source:
    """Read a picture from a file, or take one of Pillow; that one is known by the hash of its pixels and has no name.

    Raises:
        DataError: there is no such file, or it is no picture.
    """
    if isinstance(picture, Image.Image):
        return Source(picture, {"file": "", "sha256": _hash_of_pixels(picture)})
    image = open_image(picture)
    return Source(image, {"file": Path(picture).name, "sha256": hash_of_file(picture)})


def is_the_one(path: Path, sha256: str) -> bool:
    """Whether the file is the source of a recipe: the same file, or a picture of the same pixels.

    Raises:
        DataError: it is neither that file nor a picture.
    """
    return hash_of_file(path) == sha256 or _hash_of_pixels(open_image(path)) == sha256


def file_of(sources: Mapping[str, Path], role: str) -> Path:
    """The file of a role.

    Raises:
        DataError: the recipe does not name one.
    """
    if role not in sources:
        raise DataError(f"the picture's recipe does not say what it was made from: it has no source {role!r}")
    return sources[role]


def hash_of_file(path: str | os.PathLike[str]) -> str:
    """The SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _hash_of_pixels(image: Image.Image) -> str:
    digest = hashlib.sha256(f"{image.mode} {image.width}x{image.height} ".encode())
    digest.update(image.tobytes())
    return digest.hexdigest()
