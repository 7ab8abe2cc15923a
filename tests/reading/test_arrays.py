from __future__ import annotations

import os

import numpy as np
import pytest

from latentdiff.errors import DataError
from latentdiff.reading.arrays import read_array


@pytest.mark.parametrize("array", [np.eye(3), np.arange(6, dtype=np.uint8).reshape(2, 3), np.asfortranarray(np.ones((2, 3)))])
def test_numbers(tmp_path, array):
    np.save(tmp_path / "a.npy", array)
    found = read_array(tmp_path / "a.npy")
    assert found.dtype == np.float64 and np.array_equal(found, array)


def _npy(header: str, data: bytes = b"") -> bytes:
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode("latin1") + data


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"PK\x03\x04",
        _npy("{'descr': '<f8', 'fortran_order': False, 'shape': (4,)}\n", bytes(8)),
        _npy("{'descr': '<f8', 'fortran_order': False, 'shape': (10000000000, 10000000000)}\n"),
        _npy("{'descr': '<f8', 'fortran_order': False, 'shape': (-4,)}\n"),
        _npy("{'descr': '|O', 'fortran_order': False, 'shape': (1,)}\n", b"cos\nsystem\n."),
        _npy("{'descr': '<U4', 'fortran_order': False, 'shape': (1,)}\n", bytes(16)),
        _npy("(" * 9000),
        _npy("x" * 60000),
    ],
)
def test_anything_else_is_an_error_in_one_line(tmp_path, content):
    (tmp_path / "a.npy").write_bytes(content)
    with pytest.raises(DataError, match=r"a\.npy") as caught:
        read_array(tmp_path / "a.npy")
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes with names")
def test_a_pipe_does_not_block(tmp_path):
    os.mkfifo(tmp_path / "a.npy")
    with pytest.raises(DataError, match="it is a pipe"):
        read_array(tmp_path / "a.npy")
