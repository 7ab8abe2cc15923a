"""Reading one file of weights: look at its first bytes, say what it is, map its tensors. Nothing in it is executed.

The file is mapped, not read: tensors share its pages until somebody writes to them. What lies packed in a torch archive
is unpacked. Bytes and pickles are read by `latentdiff.reading`; here they become tensors.
"""

from __future__ import annotations

import warnings
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latentdiff.checkpoints.mapping import map_file, mapped_tensor
from latentdiff.checkpoints.writing import NAMES_OF_TYPES
from latentdiff.errors import CheckpointError, printable
from latentdiff.reading.plain import open_file
from latentdiff.reading.safetensors import read_header

SAFETENSORS, TORCH, OLD_TORCH = "safetensors", "torch archive", "torch pickle (before 1.6)"
IMAGE = " image"  # how the kinds of image files end

_LFS = b"version https://git-lfs"
_MAGIC = (
    (_LFS, "Git-LFS pointer"),
    (b"\x89PNG\r\n\x1a\n", "PNG image"),
    (b"GIF8", "GIF image"),
    (b"\xff\xd8\xff", "JPEG image"),
    (b"II*\0", "TIFF image"),
    (b"MM\0*", "TIFF image"),
    (b"GGUF", "GGUF file"),
    (b"\x80\x02", OLD_TORCH),
    (b"PK\x03\x04", "zip archive"),
)
_MAGIC_BEHIND = {b"WEBPVP8": "WebP image", b"avif": "AVIF image", b"avis": "AVIF image"}  # from byte 8 on
# Types that are read and not written, as far as this torch has them.
_READ_ONLY = {
    "U16": "uint16", "U32": "uint32", "U64": "uint64", "C64": "complex64", "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz",
}  # fmt: skip
TYPES = {name: dtype for dtype, name in NAMES_OF_TYPES.items()} | {
    name: getattr(torch, attribute) for name, attribute in _READ_ONLY.items() if hasattr(torch, attribute)
}
_FORMATS_LONGEST = 100_000_000  # bytes of a header that the safetensors format allows


class FileWarning(UserWarning):
    """A file is unusual and was read nevertheless: its tensors are whole."""


@dataclass(frozen=True)
class TensorFile:
    """The tensors of one file by name, its text metadata, and what else a pickle holds at its top level."""

    path: Path
    tensors: dict[str, Tensor]
    metadata: dict[str, str] = field(default_factory=dict)
    others: dict[str, Any] = field(default_factory=dict)


def sniff(path: Path) -> str:
    """Say what a file is by its first bytes and its size, never by its name.

    Raises:
        CheckpointError: it cannot be read, or is a pipe or a device.
    """
    with open_file(path) as file:
        head = file.read(512)
    if not head:
        return "empty file"
    text = head.lstrip().lower()
    if text.startswith((b"<!doctype html", b"<html")):
        return "HTML page"
    for magic, kind in _MAGIC:
        if head.startswith(magic):
            return TORCH if kind == "zip archive" and _is_torch_archive(path) else kind
    for magic, kind in _MAGIC_BEHIND.items():
        if head[8:].startswith(magic) and head.startswith(b"RIFF") | (head[4:8] == b"ftyp"):
            return kind
    if len(head) > 8 and head[8:9] == b"{" and 2 <= int.from_bytes(head[:8], "little") <= _FORMATS_LONGEST:
        return SAFETENSORS
    if text.startswith((b"{", b"[")):
        return "JSON file"
    return "file of unknown format"


def read_tensors(path: Path) -> TensorFile:
    """Map all tensors of a safetensors file or a torch pickle.

    Raises:
        CheckpointError: the file is empty, truncated, of another format, or a pickle with foreign objects.

    Warns:
        FileWarning: it is unusual, and whole.
    """
    kind = sniff(path)
    if kind == SAFETENSORS:
        return _read_safetensors(path)
    if kind in (TORCH, OLD_TORCH):
        from latentdiff.checkpoints.pickled import read_pickle

        return read_pickle(path, is_old=kind == OLD_TORCH)
    raise CheckpointError(f"expected model weights, found that {path} is {_explain(path, kind)}")


def _read_safetensors(path: Path) -> TensorFile:
    header = read_header(path)
    for oddity in header.oddities:
        warnings.warn(f"{printable(path)}: {oddity}; they were ignored", FileWarning, stacklevel=3)
    if not header.entries:
        return TensorFile(path, {}, header.metadata)
    mapped = map_file(path)
    tensors = {}
    for name, entry in header.entries.items():
        dtype = TYPES.get(entry.dtype)
        if dtype is None:
            raise CheckpointError(f"{path} holds the type {entry.dtype} ({name}), which this torch cannot read")
        tensors[name] = mapped_tensor(mapped, entry.start, dtype, entry.shape)
    return TensorFile(path, tensors, header.metadata)


def _is_torch_archive(path: Path) -> bool:
    from latentdiff.reading.archives import is_torch_archive

    return is_torch_archive(path)


def _explain(path: Path, kind: str) -> str:
    if kind == "Git-LFS pointer":
        return "a Git-LFS pointer, not the file that it stands for; fetch it with: git lfs pull"
    if kind == "HTML page":
        return "an HTML page; the download took the web page about the file, not the file (use its resolve/ link)"
    if kind == "empty file":
        return "empty; download it again"
    if kind == "zip archive":
        if not zipfile.is_zipfile(path):
            return "a truncated torch archive (its end is missing); download it again"
        return "a zip archive without torch weights; unpack it first"
    return f"a {kind}; give a safetensors or ckpt file or a model folder"
