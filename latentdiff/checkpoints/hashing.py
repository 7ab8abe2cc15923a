"""Hashes that name a model in recipes: SHA-256 of its weight files, remembered between runs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path

from latentdiff.errors import LatentDiffError
from latentdiff.files import atomic_path, cache_folder
from latentdiff.reading.json import read_object

SHORT = 10  # digits of the hash that web UIs show
_WEIGHTS = (".safetensors", ".bin", ".ckpt", ".pt", ".pth")
_WORTH_REMEMBERING = 4 * 2**20  # bytes; smaller files hash in a blink
_MOST = 1000  # files that are remembered; of more, the last
_LARGE = 64 * 2**20  # bytes; what is said of smaller files is found again each time


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


def place_hash(place: Path) -> str:
    """The hash of a file, or of the weights anywhere in a folder."""
    return file_hash(place) if place.is_file() else model_hash(p for p in place.rglob("*") if p.suffix in _WEIGHTS)


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes, 64 hex digits. That of a large file is remembered by path, size and time."""
    if path.stat().st_size < _WORTH_REMEMBERING:
        return _digest(path)
    key, known = _key(path), _remembered()
    if key not in known:
        known[key] = _digest(path)
        _remember(known)
    return known[key]


def tensors_hash(path: Path) -> str:
    """SHA-256 of a safetensors file behind its header, by which web UIs know LoRAs whatever their metadata says."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        file.seek(min(8 + length, path.stat().st_size))
        return hashlib.file_digest(file, "sha256").hexdigest()


def once(path: Path, name: str, check: Callable[[], None]) -> None:
    """Run a check that reads the whole of a file, unless it is large and passed the check called `name` before."""
    if path.stat().st_size < _LARGE:
        return check()
    key = f"{name}|{_key(path)}"
    if key not in _remembered():
        check()
        _remember(_remembered() | {key: "passed"})


def remembered(path: Path, name: str, find: Callable[[], str]) -> str:
    """What `find` says of a file, in words; of a large file it is found once."""
    if path.stat().st_size < _LARGE:
        return find()
    key = f"{name}|{_key(path)}"
    known = _remembered()
    if key not in known:
        known[key] = find()
        _remember(known)
    return known[key]


def _key(path: Path) -> str:
    stat = path.stat()
    return f"{path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}"


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _memory() -> Path:
    return cache_folder("hashes") / "files.json"


def _remembered() -> dict[str, str]:
    try:
        known = read_object(_memory())
    except LatentDiffError:
        return {}
    return {key: text for key, text in known.items() if isinstance(text, str)}


def _remember(known: dict[str, str]) -> None:
    known = dict(list(known.items())[-_MOST:])
    try:
        with atomic_path(_memory()) as temporary:
            temporary.write_text(json.dumps(known, indent=0), encoding="utf-8")
    except LatentDiffError:
        pass  # a home that cannot be written to costs only time
