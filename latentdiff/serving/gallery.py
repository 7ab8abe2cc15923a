"""The images that the page has made, in one folder, and the files that it began from."""

from __future__ import annotations

import hashlib
import re
import threading
from datetime import datetime
from pathlib import Path

from latentdiff.files import atomic_path
from latentdiff.serving.errors import Refused

SUFFIXES = {".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".webp": "image/webp"}
MOST = 500  # images that are listed
_NAME = re.compile(r"[\w][\w. -]{0,200}")


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

    def add_input(self, file: bytes, kind: str) -> Path:
        """Keep what an image begins from, once, so that a command can name it."""
        path = self.folder / "inputs" / f"{hashlib.sha256(file).hexdigest()[:16]}.{kind.lower()}"
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

    @staticmethod
    def _write(path: Path, file: bytes) -> None:
        with atomic_path(path) as temporary:
            temporary.write_bytes(file)
