"""NumPy's `.npy` files: small arrays of numbers."""

from __future__ import annotations

import math
import os
from tokenize import TokenError

import numpy as np

from latentdiff.errors import DataError
from latentdiff.reading.plain import MIB, open_file

LARGEST = 64 * MIB  # of the array's bytes
# What NumPy makes of headers and data; the header is a Python literal.
_DAMAGED = (
    OSError, ValueError, TypeError, EOFError, SyntaxError, TokenError, RecursionError, MemoryError, OverflowError,
)  # fmt: skip


def read_array(path: str | os.PathLike[str]) -> np.ndarray:
    """The numbers of a file, float64.

    Raises:
        DataError: it is not there, damaged, too large, or holds something else; pickled objects are not loaded.
    """
    with open_file(path, DataError) as file:
        try:
            version = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, _, kind = read(file)
            if math.prod(shape) * max(kind.itemsize, 8) > LARGEST:
                raise DataError(f"{os.fspath(path)} is too large: expected at most {LARGEST // MIB} MiB of numbers")
            file.seek(0)
            return np.lib.format.read_array(file, allow_pickle=False).astype(np.float64)
        except _DAMAGED as error:
            raise DataError(f"cannot read {os.fspath(path)} as numbers: {error}") from error
