"""Hashes that name a model in recipes: SHA-256 of its weight files, remembered between runs."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path

from latentdiff.errors import LatentDiffError
from latentdiff.files import atomic_path

SHORT = 10  # digits of the hash that web UIs show
_WORTH_REMEMBERING = 64 * 2**20  # bytes; smaller files hash in a blink


def model_hash(files: Iterable[Path]) -> str:
    """The hash of a model: of its file if it is one, else of the list of its files' hashes and names.

    Args:
        files: of the weights. Two levels of the path count as the name ("unet/model.safetensors").
    """
    files = sorted(files)
    if len(files) == 1:
        return file_hash(files[0])
    lines = [f"{file_hash(path)}  {path.parent.name}/{path.name}\n" for path in files]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes, 64 hex digits. That of a large file is remembered by path, size and time."""
    stat = path.stat()
    if stat.st_size < _WORTH_REMEMBERING:
        return _digest(path)
    key = f"{path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}"
    known = _remembered()
    if key not in known:
        known[key] = _digest(path)
        _remember(known)
    return known[key]


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _memory() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "latentdiff" / "hashes.json"


def _remembered() -> dict[str, str]:
    try:
        known = json.loads(_memory().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _remember(known: dict[str, str]) -> None:
    try:
        with atomic_path(_memory()) as temporary:
            temporary.write_text(json.dumps(known, indent=0), encoding="utf-8")
    except LatentDiffError:
        pass  # a home that cannot be written to costs only time
