"""Rows of numbers on disk by key: what caches are made of.

    FOLDER/KEY-OF-THE-FIRST-ROW.safetensors     "rows" (n, ...), and in its metadata the n keys

A shard is written whole or not at all and never changed, so a build that is cut off goes on with the rows that are
missing, and processes can write into one folder at the same time.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from latentdiff.errors import CheckpointError
from latentdiff.files import atomic_path
from latentdiff.reading.json import parse_json
from latentdiff.reading.safetensors import read_header

_TYPES = {"F16": np.float16, "F32": np.float32}


class RowStore:
    """Reads and writes the rows in `folder`; rows may have different shapes, those of one shard have the same."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._rows: dict[str, tuple[np.ndarray, int]] = {}  # shard and place, which take less memory than views
        self.refresh()

    def refresh(self) -> None:
        """Take in what other processes have written."""
        for path in sorted(self.folder.glob("[!.]*.safetensors")):
            self._rows |= _read_shard(path)

    def __contains__(self, key: str) -> bool:
        return key in self._rows

    def __getitem__(self, key: str) -> np.ndarray:
        shard, place = self._rows[key]
        return shard[place]

    def write(self, keys: Sequence[str], rows: np.ndarray) -> None:
        """Add rows (n, ...) under n new keys."""
        path = self.folder / f"{keys[0]}.safetensors"
        with atomic_path(path) as temporary:
            save_file({"rows": np.ascontiguousarray(rows)}, temporary, metadata={"keys": json.dumps(list(keys))})
        self._rows |= _read_shard(path)


def row_key(*parts: object) -> str:
    """32 hex digits that depend on `parts` alone."""
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()


def _read_shard(path: Path) -> dict[str, tuple[np.ndarray, int]]:
    """Where the rows of a shard lie by key, mapped from the file; a damaged one counts as missing."""
    try:
        header = read_header(path)
        about, keys = header.entries["rows"], parse_json(header.metadata["keys"], str(path))
        rows = np.memmap(path, _TYPES[about.dtype], "r", about.start, about.shape)
    except (OSError, ValueError, KeyError, TypeError, MemoryError, OverflowError, CheckpointError):
        return {}
    shard = rows.view(np.ndarray)
    return {key: (shard, place) for place, key in enumerate(keys)} if len(keys) == len(shard) else {}
