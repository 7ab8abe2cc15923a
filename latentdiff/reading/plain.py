"""Opening ordinary files, and only those: a pipe would block for ever, a device never ends."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, TextIO

from latentdiff.errors import CheckpointError, DataError, LatentDiffError

MIB = 2**20
LONGEST_CAPTION = MIB  # also of a line of metadata
LONGEST_TEXT = 32 * MIB  # the largest text files of published models, tokenizers, have 2 to 4 MiB

# Opening a pipe waits for its other end unless this is given; Windows has neither.
_AT_ONCE = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISSOCK, "a socket"),
)


def open_file(path: str | os.PathLike[str], error: type[LatentDiffError] = CheckpointError) -> BinaryIO:
    """Open an ordinary file for reading.

    Raises:
        error: it is not there, cannot be read, or is a folder, a pipe or a device.
    """
    try:
        number = os.open(path, os.O_RDONLY | _AT_ONCE)
    except (OSError, ValueError) as cause:  # ValueError: a name with a null character
        reason = getattr(cause, "strerror", None) or cause
        raise error(f"cannot read {os.fspath(path)}: {reason}; check the name and its permissions") from cause
    mode = os.fstat(number).st_mode
    if not stat.S_ISREG(mode):
        os.close(number)
        kind = next((name for test, name in _KINDS if test(mode)), "no ordinary file")
        raise error(f"cannot read {os.fspath(path)}: it is {kind}; expected a file")
    return open(number, "rb")


def read_bytes(
    path: str | os.PathLike[str], error: type[LatentDiffError] = CheckpointError, longest: int = LONGEST_TEXT
) -> bytes:
    """The content of a file of at most `longest` bytes.

    Raises:
        error: it cannot be read, or is longer.
    """
    with open_file(path, error) as file:
        try:
            content = file.read(longest + 1)
        except OSError as cause:
            raise error(f"cannot read {os.fspath(path)}: {cause.strerror or cause}; check the disk") from cause
    if len(content) > longest:
        size = f"{longest // MIB} MiB" if longest >= MIB else f"{longest // 1024} KiB"
        raise error(f"{os.fspath(path)} is too large: expected a text of at most {size}; it is probably another file")
    return content


def read_text(
    path: str | os.PathLike[str],
    error: type[LatentDiffError] = CheckpointError,
    longest: int = LONGEST_TEXT,
    *,
    remedy: str = "save it as UTF-8",
) -> str:
    """The content of a file in UTF-8, with or without a byte order mark.

    Raises:
        error: it cannot be read, is longer than `longest` bytes, or is not UTF-8.
    """
    return decode(read_bytes(path, error, longest), os.fspath(path), error, remedy=remedy)


def decode(
    content: bytes, place: str, error: type[LatentDiffError] = CheckpointError, *, remedy: str = "save it as UTF-8"
) -> str:
    """Bytes as UTF-8 text; `place` says in messages where they come from.

    Raises:
        error: they are none.
    """
    try:
        return content.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as cause:
        raise error(
            f"{place} is not UTF-8 text (byte {cause.start} is {content[cause.start]:#04x}); {remedy}"
        ) from cause


def bounded_lines(file: TextIO, place: str) -> Iterator[str]:
    """The lines of a text, as iterating over it gives them, none longer than a caption may be.

    Raises:
        DataError: one is.
    """
    number = 0
    while line := file.readline(LONGEST_CAPTION + 1):
        number += 1
        if len(line) > LONGEST_CAPTION:
            raise DataError(f"{place} line {number} is longer than {LONGEST_CAPTION:,} letters; it is probably another file")
        yield line


def exists(path: Path) -> bool:
    """Whether something is there; a name that no file can have is not."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False
