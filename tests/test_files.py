"""Atomic writing."""

from __future__ import annotations

import os

import pytest

from latentdiff.errors import LatentDiffError
from latentdiff.files import atomic_path


def test_the_file_appears_whole_and_alone(tmp_path) -> None:
    target = tmp_path / "new" / "image.png"
    with atomic_path(target) as temporary:
        assert temporary.suffix == ".png" and temporary.parent == target.parent
        temporary.write_bytes(b"data")
        assert not target.exists()
    assert target.read_bytes() == b"data"
    assert os.listdir(target.parent) == ["image.png"]


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path) -> None:
    target = tmp_path / "weights.bin"
    target.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt), atomic_path(target) as temporary:
        temporary.write_bytes(b"half")
        raise KeyboardInterrupt
    assert target.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["weights.bin"]


def test_an_unwritable_place_is_one_line(tmp_path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(LatentDiffError, match="cannot write"), atomic_path(tmp_path / "file" / "x.png"):
        raise AssertionError("the body must not run")


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path) -> None:
    with pytest.raises(LatentDiffError, match="No space left"), atomic_path(tmp_path / "x.png"):
        raise OSError(28, "No space left on device")
    assert os.listdir(tmp_path) == []
