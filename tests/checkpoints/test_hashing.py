"""Hashes of files, and which of them are remembered."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from latentdiff.checkpoints import hashing
from latentdiff.checkpoints.embedded import embedded_model
from latentdiff.checkpoints.hashing import file_hash, model_hash
from latentdiff.checkpoints.layout import PARTS


@pytest.fixture
def read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files that are read to be hashed, with a cache folder of their own."""
    found: list[str] = []
    digest = hashing._digest
    monkeypatch.setenv("LATENTDIFF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hashing, "_digest", lambda path: found.append(path.name) or digest(path))
    return found


def test_a_large_file_is_read_once_until_it_changes(tmp_path, read):
    path = tmp_path / "large"
    for content in (bytes(5 * 2**20), b"a" * 5 * 2**20):
        path.write_bytes(content)
        os.utime(path, ns=(0, len(read)))
        assert file_hash(path) == file_hash(path) == hashlib.sha256(content).hexdigest()
    assert read == ["large", "large"]
    (tmp_path / "cache" / "hashes" / "files.json").write_text("no JSON", encoding="utf-8")
    assert file_hash(path) == hashlib.sha256(content).hexdigest() and len(read) == 3


def test_no_more_are_remembered_than_are_read_quickly(tmp_path, read, monkeypatch):
    monkeypatch.setattr(hashing, "_MOST", 2)
    monkeypatch.setattr(hashing, "_WORTH_REMEMBERING", 1)
    paths = [tmp_path / name for name in "abc"]
    for path in (*paths, *reversed(paths)):
        path.write_text(path.name)
        os.utime(path, ns=(0, 0))
        file_hash(path)
    assert read == ["a", "b", "c", "a"]


def test_the_embedded_model_is_hardly_read_for_its_hash(read):
    files = [next((embedded_model() / part).glob("*.safetensors")) for part in PARTS]
    assert model_hash(files) == model_hash(files)
    again = read[len(files) :]
    assert sum((embedded_model() / "text_encoder" / name).stat().st_size for name in again) < 5 * 2**20
