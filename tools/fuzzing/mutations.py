"""How files are damaged: bytes, values in JSON, records in zip archives, programs in pickles."""

from __future__ import annotations

import json
import os
import random
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

DEEP = json.loads("[" * 500 + "]" * 500)
HOSTILE: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 2, 3, 77, 10**4, 2**31, 2**63 - 1, 2**64, 10**10, 10**30, 0.5, -0.5, 1e308, float("nan"),
    float("inf"), "", "x", "/etc/passwd", "../../x", "\x1b[31m", "\ud800", "(" * 50, "(a+)+$", "a" * 10_000, [], {}, [[]],
    {"": None}, [1] * 5000, [None], ["x", 1], {"content": 1}, DEEP,
)  # fmt: skip


def bytes_of(rng: random.Random, content: bytes) -> bytes:
    """A few bytes flipped, cut off, added, moved or doubled."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 5, 20))):
        place = rng.randrange(len(data) + 1) if rng.random() < 0.5 else rng.randrange(min(len(data), 600) + 1)
        match rng.randrange(7):
            case 0 | 1 if place < len(data):
                data[place] ^= 1 << rng.randrange(8)
            case 2 if place < len(data):
                data[place] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
            case 3:
                del data[place:]
            case 4:
                data[place:place] = rng.choice((b"\0", b"\xff" * 8, b"{", b"[" * 2000, b'"', rng.randbytes(16)))
            case 5:
                del data[place : place + rng.choice((1, 2, 8, 64))]
            case 6:
                data[place:place] = data[: rng.randrange(1, 64)]
    return bytes(data)


def value_of(rng: random.Random, value: Any) -> Any:
    """The same JSON value with one part of it replaced, left out, renamed or added."""
    value = json.loads(json.dumps(value))
    holders = [holder for holder in _holders(value) if holder]
    if not holders:
        return rng.choice(HOSTILE)
    for _ in range(rng.choice((1, 1, 2))):
        holder = rng.choice(holders)
        if not holder:
            continue
        key = rng.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
        match rng.randrange(6):
            case 0:
                del holder[key]
            case 1 if isinstance(holder, dict):
                holder[rng.choice(("", "x", "\x1b]0;", "\ud800", "n" * 500))] = rng.choice(HOSTILE)
            case 2 if isinstance(holder[key], (int, float)):
                holder[key] = rng.choice((holder[key] + 1, -holder[key], holder[key] * 1000, str(holder[key])))
            case _:
                holder[key] = rng.choice(HOSTILE)
    return value


def _holders(value: Any) -> list[Any]:
    if not isinstance(value, (dict, list)):
        return []
    parts = list(value.values()) if isinstance(value, dict) else value
    return [value, *(holder for part in parts[:400] for holder in _holders(part))]


def text_of(rng: random.Random, value: Any) -> bytes:
    """JSON text of a value, some of it no JSON any more."""
    text = json.dumps(value, ensure_ascii=rng.random() < 0.8).encode("utf-8", "surrogatepass")
    return bytes_of(rng, text) if rng.random() < 0.2 else text


def header_of(rng: random.Random, content: bytes, change: Callable[[dict[str, Any]], Any]) -> bytes:
    """A safetensors file with another header before the same tensors."""
    length = int.from_bytes(content[:8], "little")
    text = text_of(rng, change(json.loads(content[8 : 8 + length])))
    length = len(text) if rng.random() < 0.95 else rng.choice((0, 1, len(text) * 2, 2**40, 2**63))
    return length.to_bytes(8, "little") + text + content[8 + int.from_bytes(content[:8], "little") :]


def archive_of(
    rng: random.Random, source: Path, target: Path, change: Callable[[str, bytes], bytes], *, packed: bool = False
) -> None:
    """A zip archive packed again, its checksums right, with changed records."""
    method = zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", method) as new:
        for name in old.namelist():
            if rng.random() < 0.02:
                continue
            renamed = name if rng.random() < 0.98 else rng.choice(("../x", "", "a/data.pkl", name + "x", name * 50))
            new.writestr(renamed or "x", change(name, old.read(name)))


_INSTRUCTIONS = (
    b")", b"]", b"}", b"(", b"0", b"1", b"2", b"N", b"R", b"b", b"\x81", b"\x85", b"\x86", b"\x87", b"t", b"u", b"s", b"a",
    b"e", b"Q", b"\x8a\x08" + b"\xff" * 7 + b"\x7f", b"\x8b\xff\xff\xff\x7f", b"X\xff\xff\xff\x7f", b"r\xff\xff\xff\x7f",
    b"\x96\xff\xff\xff\xff\xff\xff\xff\x7f", b"cos\nsystem\n", b"cbuiltins\nbytearray\n",
    b"ctorch._utils\n_rebuild_tensor_v2\n",
    b"ccollections\nOrderedDict\n", b"cbuiltins\neval\n", b"ctorch.nn\nLinear\n", b"h\x00", b"j\x00\x00\x00\x00", b"P1\n", b".",
    b"cnumpy.core.multiarray\nscalar\n", b"\x8c\x01a", b"J\xff\xff\xff\xff", b"K\x01", b"M\xff\xff", b"(" + b")\x85" * 200,
)  # fmt: skip


def program_of(rng: random.Random, content: bytes) -> bytes:
    """A pickle with other instructions in it."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 4))):
        place = rng.randrange(min(2, len(data)), len(data) + 1)
        code = rng.choice(_INSTRUCTIONS)
        data[place : place + rng.choice((0, 0, len(code)))] = code * rng.choice((1, 1, 1, 50))
    return bytes(data)


def unlike_file(rng: random.Random, path: Path) -> str:
    """Put something else than a file there; returns what."""
    path.unlink(missing_ok=True)
    kind = rng.choice(("pipe", "device", "folder", "loop", "gone", "empty"))
    match kind:
        case "pipe":
            os.mkfifo(path)
        case "device":
            path.symlink_to("/dev/zero")
        case "folder":
            path.mkdir()
        case "loop":
            path.symlink_to(path.name)
        case "empty":
            path.touch()
    return kind
