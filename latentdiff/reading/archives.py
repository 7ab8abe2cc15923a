"""Zip archives and old files of torch: where the records of weights lie, whole and within their file.

Stored records are given by their place and can be mapped; packed ones are unpacked, within limits. The checksum of
every record is compared, which torch's own reader leaves out.
"""

from __future__ import annotations

import os
import struct
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NoReturn

from latentdiff.errors import CheckpointError
from latentdiff.reading.pickled_names import PickleError, Storage
from latentdiff.reading.pickles import Pickled, read_pickle
from latentdiff.reading.plain import MIB, open_file
from latentdiff.reading.safetensors import BITS

LONGEST_PICKLE = 64 * MIB  # the names and shapes of SD 1.5 take 0.2 MiB
_MOST_RECORDS, _LONGEST_NAME = 100_000, 512
_MOST_GROWTH, _ALWAYS_ALLOWED = 16, 256 * MIB  # unpacked, at most 16 times the file and 256 MiB
_LOCAL = struct.Struct("<4s22xHH")  # a record's own header: mark, length of the name, length of more
_END = b"PK\x05\x06"
_CHUNK = 4 * MIB
_OLD_MAGIC = 0x1950A86A20F9469CFC6C  # torch.serialization before 1.6


@dataclass(frozen=True)
class Record:
    """The bytes of one storage: `content` where they were packed, else `size` bytes at `start` of the file."""

    start: int
    size: int
    crc: int | None = None
    content: bytes | None = None


@dataclass(frozen=True)
class Archive:
    """A file of torch: what its pickle holds, and the bytes of the storages that it refers to."""

    pickled: Pickled
    records: dict[str, Record]

    def record(self, path: Path, storage: Storage) -> Record:
        """The bytes of a storage.

        Raises:
            CheckpointError: there are none, or too few.
        """
        found = self.records.get(storage.key)
        needed = storage.count * BITS[storage.dtype] // 8
        if found is None or found.size < needed:
            there = "none" if found is None else f"{found.size}"
            damaged(path, f"its storage {storage.key!r} needs {needed} bytes, found {there}")
        return found


def is_torch_archive(path: Path) -> bool:
    """Whether a zip file holds what `torch.save` writes."""
    try:
        with open_file(path) as file:
            return any(_is_pickle(info.filename) for info in _directory(path, file))
    except CheckpointError:
        return False


def read_archive(path: Path) -> Archive:
    """Read the pickle of a file that torch 1.6 or later wrote, and find its records.

    Raises:
        CheckpointError: it is damaged, packs too much, or its pickle is.
    """
    with open_file(path) as file:
        listed = _directory(path, file)
        pickle = next(info for info in listed if _is_pickle(info.filename))
        root = pickle.filename.removesuffix("data.pkl")
        if pickle.file_size > LONGEST_PICKLE:
            damaged(path, f"its pickle has {pickle.file_size:,} bytes, expected at most {LONGEST_PICKLE:,}")
        allowed = _ALWAYS_ALLOWED + _MOST_GROWTH * os.fstat(file.fileno()).st_size
        pickled = _run(path, _content(path, file, pickle), 0)
        records = {}
        for info in listed:
            if info.filename == root + "byteorder" and _content(path, file, info).strip() == b"big":
                damaged(path, "its numbers are stored big end first, which is not supported")
            if not info.filename.startswith(root + "data/"):
                continue
            record = _record(path, file, info, allowed)
            allowed -= 0 if record.content is None else record.size
            records[info.filename.removeprefix(root + "data/")] = record
    return Archive(pickled, records)


def verify(path: Path, archive: Archive) -> None:
    """Compare the checksums of the records that were not unpacked.

    Raises:
        CheckpointError: one is wrong.
    """
    with open_file(path) as file:
        for key, record in archive.records.items():
            if record.content is not None or record.crc is None:
                continue
            file.seek(record.start)
            left, found = record.size, 0
            while left and (chunk := file.read(min(_CHUNK, left))):
                found, left = zlib.crc32(chunk, found), left - len(chunk)
            if found != record.crc:
                damaged(path, f"the checksum of its storage {key!r} is wrong")


def read_old(path: Path) -> Archive:
    """Read a file that torch before 1.6 wrote: five pickles, then each storage with its length before it.

    Raises:
        CheckpointError: it is damaged.
    """
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        content = file.read(LONGEST_PICKLE)
        found: list[Pickled] = []
        for _ in range(5):
            found.append(_run(path, content, found[-1].end if found else 0))
            if found[-1].foreign:
                return Archive(found[-1], {})
            if found[0].value != _OLD_MAGIC:
                damaged(path, "it is a pickle without the number that torch's files begin with")
        *_, system, pickled, keys = found
        if isinstance(system.value, dict) and system.value.get("little_endian") is False:
            damaged(path, "its numbers are stored big end first, which is not supported")
        if not isinstance(keys.value, list):
            damaged(path, "its list of storages is missing")
        return Archive(pickled, _old_records(path, file, pickled, keys, size))


def _old_records(path: Path, file: BinaryIO, pickled: Pickled, keys: Pickled, size: int) -> dict[str, Record]:
    bits = {storage.key: BITS[storage.dtype] for storage in pickled.storages}
    place, records = keys.end, {}
    for key in map(str, keys.value):
        file.seek(place)
        count = int.from_bytes(file.read(8), "little", signed=True)
        length = count * bits.get(key, 8) // 8
        if not 0 <= length <= size - place - 8:
            damaged(path, f"its storage {key[:40]!r} has {count} numbers, more than the file")
        records[key] = Record(place + 8, length)
        place += 8 + length
    return records


def damaged(path: Path, reason: object) -> NoReturn:
    """Raise the error of a damaged file."""
    raise CheckpointError(f"{path} is damaged: {reason}; download it again")


def _run(path: Path, content: bytes, start: int) -> Pickled:
    try:
        return read_pickle(content, start)
    except PickleError as error:
        damaged(path, error)


def _is_pickle(name: str) -> bool:
    return name == "data.pkl" or name.endswith("/data.pkl")


def _directory(path: Path, file: BinaryIO) -> list[zipfile.ZipInfo]:
    """What the archive lists. The library reads all of it into memory, so that the count is looked at first."""
    size = os.fstat(file.fileno()).st_size
    file.seek(max(0, size - 2**16 - 22))
    tail = file.read()
    place = tail.rfind(_END)
    length = int.from_bytes(tail[place + 12 : place + 16], "little") if place >= 0 else 0
    if length > _LONGEST_NAME * _MOST_RECORDS and length != 2**32 - 1:  # which says: it stands elsewhere
        damaged(path, f"it lists more than {_MOST_RECORDS:,} records")
    try:
        with zipfile.ZipFile(file) as archive:
            listed = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, struct.error, OverflowError) as error:
        damaged(path, f"its list of records cannot be read ({error})")
    if len(listed) > _MOST_RECORDS:
        damaged(path, f"it lists more than {_MOST_RECORDS:,} records")
    return listed


def _record(path: Path, file: BinaryIO, info: zipfile.ZipInfo, allowed: int) -> Record:
    if info.compress_type != zipfile.ZIP_STORED:
        if info.file_size > allowed:
            damaged(
                path, f"its record {info.filename!r} unpacks to {info.file_size:,} bytes, far more than the file has"
            )
        content = _content(path, file, info)
        return Record(0, len(content), content=content)
    start = _start(path, file, info)
    if info.file_size != info.compress_size:
        damaged(path, f"its record {info.filename!r} has two lengths")
    return Record(start, info.file_size, info.CRC)


def _start(path: Path, file: BinaryIO, info: zipfile.ZipInfo) -> int:
    """Where the bytes of a record begin, behind its own header."""
    size = os.fstat(file.fileno()).st_size
    if not 0 <= info.header_offset <= size - _LOCAL.size:
        damaged(path, f"its record {info.filename!r} lies outside the file")
    file.seek(info.header_offset)
    mark, length, more = _LOCAL.unpack(file.read(_LOCAL.size))
    name = file.read(length).decode("utf-8", "replace")
    if name.isascii() and name != info.orig_filename:
        damaged(path, f"its record {info.filename!r} is called {name!r} in another place")
    start = info.header_offset + _LOCAL.size + length + more
    if mark != b"PK\x03\x04" or start + info.compress_size > size:
        damaged(path, f"its record {info.filename!r} lies outside the file")
    return start


def _content(path: Path, file: BinaryIO, info: zipfile.ZipInfo) -> bytes:
    """A record unpacked, no more of it than it says, and checked."""
    start = _start(path, file, info)
    file.seek(start)
    packed = file.read(info.compress_size)
    try:
        if info.compress_type == zipfile.ZIP_STORED:
            content = packed
        elif info.compress_type == zipfile.ZIP_DEFLATED:
            content = zlib.decompressobj(-15).decompress(packed, info.file_size + 1)
        else:
            damaged(
                path, f"its record {info.filename!r} is packed by method {info.compress_type}, which is not supported"
            )
    except (zlib.error, MemoryError) as error:
        damaged(path, f"its record {info.filename!r} cannot be unpacked ({error})")
    if len(content) != info.file_size or zlib.crc32(content) != info.CRC:
        damaged(path, f"the checksum of its record {info.filename!r} is wrong")
    return content
