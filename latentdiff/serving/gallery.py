"""The images that the page has made, in one folder, and the files that it began from."""

from __future__ import annotations

import hashlib
import re
import threading
from datetime import datetime
from pathlib import Path

from latentdiff.files import atomic_path
from latentdiff.reading.images import opened
from latentdiff.serving.errors import Refused

SUFFIXES = {".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".webp": "image/webp"}
MOST = 500  # images that are listed
INPUTS = "inputs"  # the folder beside the images, for what they were made from
_NAME = re.compile(r"[\w][\w. -]{0,200}")
_INPUT = re.compile(r"[0-9a-f]{16}\.[a-z0-9]{1,8}")


def input_name(file: bytes) -> str:
    """What an image that was sent is called: by its content and its kind.

    Raises:
        DataError: it is no image.
    """
    with opened(file, "the image") as image:
        kind = (image.format or "png").lower()
    return f"{hashlib.sha256(file).hexdigest()[:16]}.{'jpg' if kind == 'jpeg' else kind}"


class Gallery:
    """A folder; its parts are found by the names in it, never by a path."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = threading.Lock()

    def add(self, file: bytes, suffix: str, seed: int) -> str:
        """Keep an image; returns its name, which sorts by time."""
        with self._lock:
            stem = f"{datetime.now():%Y%m%d-%H%M%S}-{seed}"
            names = (f"{stem}{'' if number == 1 else f'-{number}'}{suffix}" for number in range(1, 10_000))
            name = next(name for name in names if not (self.folder / name).exists())
            self._write(self.folder / name, file)
        return name

    def add_input(self, file: bytes, name: str) -> Path:
        """Keep what an image is made from, once, under its `input_name`, so that a command can name it."""
        path = self.folder / INPUTS / name
        if not path.exists():
            self._write(path, file)
        return path

    def names(self) -> list[str]:
        """The latest first."""
        if not self.folder.is_dir():
            return []
        found = [path for path in self.folder.iterdir() if path.suffix.lower() in SUFFIXES and path.name[0] != "."]
        found = [path for path in found if path.is_file() and not path.is_symlink()]
        return [path.name for path in sorted(found, key=lambda path: path.stat().st_mtime_ns, reverse=True)][:MOST]

    def path(self, name: str) -> Path:
        """The file of a name.

        Raises:
            Refused: there is none.
        """
        path = self.folder / name
        if not _NAME.fullmatch(name) or path.suffix.lower() not in SUFFIXES or path.is_symlink() or not path.is_file():
            raise Refused(404, "there is no such image")
        return path

    def input(self, name: str) -> Path:
        """The file that an image was made from.

        Raises:
            Refused: there is none.
        """
        path = self.folder / INPUTS / name
        if not _INPUT.fullmatch(name) or path.is_symlink() or not path.is_file():
            raise Refused(404, f"what the image was made from is not here: {name[:80]}")
        return path

    @staticmethod
    def _write(path: Path, file: bytes) -> None:
        with atomic_path(path) as temporary:
            temporary.write_bytes(file)
