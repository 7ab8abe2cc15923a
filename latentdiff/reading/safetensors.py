"""The header of a safetensors file, checked through and through against the file's size.

8 bytes: length of the header, little endian; the header: JSON, name -> {"dtype", "shape", "data_offsets"}, and texts
under "__metadata__"; then the bytes of the tensors. https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from latentdiff.errors import CheckpointError
from latentdiff.reading.json import parse_object
from latentdiff.reading.plain import MIB, decode, open_file

LONGEST_HEADER = 32 * MIB  # 300,000 tensors; the format allows 100 MB
METADATA = "__metadata__"
# Bits of one number of each type of the format.
BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64,
    "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip
_MOST_DIMENSIONS = 64


class Entry(NamedTuple):
    """One tensor: where its bytes lie, counted from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Header:
    """What a safetensors file says that it holds; `oddities` is what is unusual about it and does no harm."""

    entries: dict[str, Entry]
    metadata: dict[str, str]
    oddities: list[str] = field(default_factory=list)


def read_header(path: Path) -> Header:
    """Read and check the header of a safetensors file. Of the tensors nothing is read.

    Raises:
        CheckpointError: the header is damaged, contradicts itself, or promises more bytes than the file has.
    """
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if 8 + length > size:
            raise CheckpointError(_truncated(path, f"its header alone is {8 + length} bytes", size))
        if length > LONGEST_HEADER:
            _damaged(path, f"its header has {length:,} bytes, expected at most {LONGEST_HEADER:,}")
        text = decode(file.read(length), f"the header of {path}", CheckpointError, remedy="download it again")
    content = parse_object(text, f"the header of {path}", CheckpointError)
    metadata = _metadata(path, content.pop(METADATA, {}))
    base = 8 + length
    entries = {name: _entry(path, name, value, base) for name, value in content.items()}
    return Header(entries, metadata, _check_places(path, entries, base, size))


def _metadata(path: Path, content: Any) -> dict[str, str]:
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(text, str) for text in content.values()):
        _damaged(path, f"{METADATA} of its header must hold texts")
    return content


def _entry(path: Path, name: str, value: Any, base: int) -> Entry:
    try:
        dtype, shape, (start, end) = value["dtype"], value["shape"], value["data_offsets"]
        # `type` and not `isinstance`: a boolean is no size.
        sound = type(start) is int and type(end) is int and isinstance(shape, list) and 0 <= start <= end
        sound = sound and isinstance(dtype, str) and len(shape) <= _MOST_DIMENSIONS
    except (KeyError, TypeError, ValueError):
        sound = False
    if not sound:
        _damaged(path, f"the entry {_cut(name)} of its header needs dtype, shape and two data_offsets")
    if dtype not in BITS:
        _damaged(path, f"the tensor {_cut(name)} has the type {_cut(dtype)}, which the format does not know")
    count = 1
    for side in shape:
        if type(side) is not int or side < 0:
            _damaged(path, f"the tensor {_cut(name)} has the shape {_cut(shape)}, expected sizes")
        count *= side
    if (end - start) * 8 != count * BITS[dtype]:
        _damaged(path, f"the tensor {_cut(name)} of shape {_cut(shape)} in {dtype} has {end - start} bytes")
    return Entry(dtype, tuple(shape), base + start, base + end)


def _check_places(path: Path, entries: dict[str, Entry], base: int, size: int) -> list[str]:
    """Tensors may leave gaps and bytes at the end, but share none and end within the file."""
    end, gaps = base, 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)):
        if entry.end > size:
            last = max(other.end for other in entries.values())
            raise CheckpointError(_truncated(path, f"its header promises {last} bytes", size))
        if entry.start < end and entry.start < entry.end:
            _damaged(path, f"the tensor {_cut(name)} overlaps another")
        gaps += max(0, entry.start - end)
        end = max(end, entry.end)
    oddities = [f"{gaps} bytes between its tensors belong to none"] if gaps else []
    return oddities + ([f"{size - end} bytes behind its tensors belong to none"] if size > end else [])


def _damaged(path: Path, reason: str) -> NoReturn:
    raise CheckpointError(f"{path} is damaged: {reason}; download it again")


def _truncated(path: Path, promise: str, size: int) -> str:
    return f"{path} is truncated: {promise}, the file has {size}; download it again"


def _cut(value: object) -> str:
    text = str(value)
    return repr(text) if len(text) <= 80 else repr(text[:80]) + "..."
