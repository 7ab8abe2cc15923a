"""Members of a tar file: where each lies, and that it lies there."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from latentdiff.errors import DataError
from latentdiff.reading.json import is_unicode
from latentdiff.reading.plain import open_file

# What the library lets out on damaged files. A header that asks for more than there is memory is one of them.
_DAMAGED = (tarfile.TarError, OSError, EOFError, ValueError, MemoryError, OverflowError, RecursionError, LookupError)


class Member(NamedTuple):
    """A file in a tar file: `size` bytes at `start`."""

    name: str
    start: int
    size: int


def list_members(path: Path) -> Iterator[Member]:
    """The ordinary files of a tar file that is not compressed, in their order. Only headers are read.

    Raises:
        DataError: it is damaged, or a member lies outside or is not stored plainly.
    """
    with open_file(path, DataError) as file:
        size = os.fstat(file.fileno()).st_size
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for member in tar:
                    tar.members.clear()  # the library keeps all that it has seen
                    if not member.isreg():
                        continue
                    if member.issparse() or not 0 <= member.offset_data <= member.offset_data + member.size <= size:
                        raise DataError(f"{member.name[:80]} in {path} lies outside the file; make or fetch it again")
                    if not is_unicode(member.name):
                        raise DataError(f"{member.name[:80]!r} in {path} is no name in UTF-8; make it again")
                    yield Member(member.name, member.offset_data, member.size)
                file.seek(tar.offset)
                if any(file.read(tarfile.BLOCKSIZE)):  # the library takes a damaged header for the end
                    raise DataError(f"{path} is damaged at byte {tar.offset}; make or fetch it again")
        except _DAMAGED as error:
            raise DataError(f"cannot read the shard {path}: {error}; make or fetch it again") from error
