"""Reading one file of weights: look at its first bytes, say what it is, map its tensors. Nothing in it is executed.

A safetensors file is mapped, not read: tensors share the file's pages until somebody writes to them. A pickle
(`.ckpt`, `.bin`) goes through torch's restricted unpickler; other objects than tensors and plain data are
refused by name.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latentdiff.checkpoints.mapping import map_file, mapped_tensor
from latentdiff.checkpoints.writing import NAMES_OF_TYPES
from latentdiff.errors import CheckpointError

SAFETENSORS, TORCH, OLD_TORCH = "safetensors", "torch archive", "torch pickle (before 1.6)"
PNG, GIF = "PNG image", "GIF image"

_LFS = b"version https://git-lfs"
_MAGIC = (
    (_LFS, "Git-LFS pointer"),
    (b"\x89PNG\r\n\x1a\n", PNG),
    (b"GIF8", GIF),
    (b"\xff\xd8\xff", "JPEG image"),
    (b"GGUF", "GGUF file"),
    (b"\x80\x02", OLD_TORCH),
    (b"PK\x03\x04", "zip archive"),
)
TYPES = {name: dtype for dtype, name in NAMES_OF_TYPES.items()}
_LONGEST_HEADER = 100_000_000  # the safetensors format allows no longer one
# What PyTorch Lightning leaves in its checkpoints beside the weights. An inert stand-in takes the place of each.
_LEFTOVERS = ("pytorch_lightning.", "lightning.", "lightning_fabric.", "omegaconf.", "typing.", "numpy.")


@dataclass(frozen=True)
class TensorFile:
    """The tensors of one file by name, its text metadata, and what else a pickle holds at its top level."""

    path: Path
    tensors: dict[str, Tensor]
    metadata: dict[str, str] = field(default_factory=dict)
    others: dict[str, Any] = field(default_factory=dict)


def sniff(path: Path) -> str:
    """Say what a file is by its first bytes and its size, never by its name."""
    with open(path, "rb") as file:
        head = file.read(512)
    if not head:
        return "empty file"
    text = head.lstrip().lower()
    if text.startswith((b"<!doctype html", b"<html")):
        return "HTML page"
    for magic, kind in _MAGIC:
        if head.startswith(magic):
            return TORCH if kind == "zip archive" and _is_torch_archive(path) else kind
    if len(head) > 8 and head[8:9] == b"{" and 2 <= int.from_bytes(head[:8], "little") <= _LONGEST_HEADER:
        return SAFETENSORS
    if text.startswith((b"{", b"[")):
        return "JSON file"
    return "file of unknown format"


def read_tensors(path: Path) -> TensorFile:
    """Map all tensors of a safetensors file or a torch pickle.

    Raises:
        CheckpointError: the file is empty, truncated, of another format, or a pickle with foreign objects.
    """
    kind = sniff(path)
    if kind == SAFETENSORS:
        return _read_safetensors(path)
    if kind in (TORCH, OLD_TORCH):
        return _read_pickle(path, kind)
    raise CheckpointError(f"expected model weights, found that {path} is {_explain(path, kind)}")


def read_header(path: Path) -> dict[str, Any]:
    """The header of a safetensors file, checked against the file's size: name -> dtype, shape, data_offsets.

    Raises:
        CheckpointError: the header is damaged or promises more bytes than the file has.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if 8 + length > size:
            raise CheckpointError(_truncated(path, f"its header alone is {8 + length} bytes", size))
        try:
            header = json.loads(file.read(length))
            end = max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{path} is damaged: its safetensors header is not readable ({error}); download it again"
            ) from error
    if 8 + length + end > size:
        raise CheckpointError(_truncated(path, f"its header promises {8 + length + end} bytes", size))
    return header


def _read_safetensors(path: Path) -> TensorFile:
    from safetensors import SafetensorError, safe_open

    header = read_header(path)
    mapped = map_file(path)
    start = 8 + int.from_bytes(mapped[:8], "little")
    try:
        with safe_open(path, framework="pt") as file:  # checks the header through and through
            tensors = {}
            for name in file.keys():  # noqa: SIM118 - not a dict
                entry, dtype = header[name], TYPES.get(header[name]["dtype"])
                offset = start + entry["data_offsets"][0]
                # Types that only the library knows are read by it, without a mapping.
                known = dtype is not None
                tensors[name] = (
                    mapped_tensor(mapped, offset, dtype, tuple(entry["shape"])) if known else file.get_tensor(name)
                )
            return TensorFile(path, tensors, file.metadata() or {})
    except (SafetensorError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged: {_first_line(error)}; download it again") from error


def _read_pickle(path: Path, kind: str) -> TensorFile:
    import pickle

    stand_ins = _stand_ins(path) if kind == TORCH else []
    try:
        with torch.serialization.safe_globals(stand_ins):
            content = _load_pickle(path, kind)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} is a pickle with more than weights in it and was not opened: {_forbidden(error)}; "
            "ask its author for a safetensors file"
        ) from error
    except (RuntimeError, EOFError, ValueError, LookupError, TypeError, AttributeError) as error:  # torch lets them out
        raise CheckpointError(f"{path} is damaged: {_first_line(error)}; download it again") from error
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, expected a dictionary of tensors")
    return _unwrap(path, content)


def _load_pickle(path: Path, kind: str) -> Any:
    # torch maps archives only, and takes every name in .safetensors for a safetensors file, whatever is in it.
    if kind == TORCH and path.suffix != ".safetensors":
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    with open(path, "rb") as file:
        return torch.load(file, map_location="cpu", weights_only=True)


def _unwrap(path: Path, content: Mapping[Any, Any]) -> TensorFile:
    """Training frameworks put the weights under `state_dict`, beside optimiser states and counters."""
    state = content.get("state_dict", content)
    if not isinstance(state, Mapping):
        raise CheckpointError(f"{path} has a state_dict that is a {type(state).__name__}, expected a dictionary")
    tensors = {str(name): value.detach() for name, value in state.items() if isinstance(value, Tensor)}
    others = {str(name): value for name, value in state.items() if not isinstance(value, Tensor)}
    if state is not content:
        others |= {str(name): value for name, value in content.items() if name != "state_dict"}
    return TensorFile(path, tensors, others=others)


class _Leftover:
    """Takes the place of a training framework's object in a pickle: accepts any state and does nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def forbidden_globals(path: Path) -> list[str]:
    """The names in a torch archive that torch's restricted unpickler would not load, found without running it."""
    import pickle

    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(str(path)))
    except (RuntimeError, ValueError, EOFError, IndexError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{path} is damaged: {_first_line(error)}; download it again") from error


def _stand_ins(path: Path) -> list[type]:
    """Stand-ins for everything that the restricted unpickler would refuse, if all of it is known to be harmless.

    Raises:
        CheckpointError: names the objects that are not.
    """
    names = forbidden_globals(path)
    foreign = [name for name in names if not name.startswith(_LEFTOVERS)]
    if foreign:
        shown = ", ".join(foreign[:5])
        raise CheckpointError(
            f"{path} is a pickle that asks for {shown}, which could run code, and was not opened; expected "
            "tensors only. Ask its author for a safetensors file"
        )
    return [type(name.rpartition(".")[2], (_Leftover,), {"__module__": name.rpartition(".")[0]}) for name in names]


def _is_torch_archive(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("data.pkl") for name in archive.namelist())
    except (zipfile.BadZipFile, OSError):
        return False


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


def _truncated(path: Path, promise: str, size: int) -> str:
    return f"{path} is truncated: {promise}, the file has {size}; download it again"


def _forbidden(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if "Unsupported" in line or "GLOBAL" in line]
    return lines[0].split(". Please")[0] if lines else _first_line(error)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
