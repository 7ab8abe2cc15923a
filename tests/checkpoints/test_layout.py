"""Fetching weights ahead: the files that loading will read, and never an error."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from latentdiff.checkpoints.embedded import embedded_model
from latentdiff.checkpoints.folder import weight_files
from latentdiff.checkpoints.layout import PARTS, read_ahead

pytestmark = pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="this system cannot be asked")


@pytest.fixture
def asked(monkeypatch) -> list[Path]:
    """The files that the system was asked to fetch."""
    paths: list[Path] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda file, *_: paths.append(Path(os.readlink(f"/proc/self/fd/{file}"))))
    return paths


def test_what_loading_reads(asked):
    read_ahead(embedded_model())
    assert asked == [path for part in PARTS for path in weight_files(embedded_model(), part)]


def test_better_files_first_and_no_shards(asked, tmp_path):
    names = (
        "unet/diffusion_pytorch_model.fp16.safetensors", "unet/diffusion_pytorch_model.bin",
        "text_encoder/pytorch_model.bin",
        "vae/diffusion_pytorch_model.safetensors.index.json", "vae/diffusion_pytorch_model.fp16.bin",
    )  # fmt: skip
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    read_ahead(tmp_path)
    assert asked == [tmp_path / "unet/diffusion_pytorch_model.bin", tmp_path / "text_encoder/pytorch_model.bin"]


def test_one_file_and_nothing(asked, tmp_path):
    (tmp_path / "model.ckpt").write_text("x")
    for source in (tmp_path / "model.ckpt", tmp_path / "nothing", Path("owner/name"), tmp_path):
        read_ahead(source)
    assert asked == [tmp_path / "model.ckpt"]


def test_systems_that_cannot_be_asked(monkeypatch):
    monkeypatch.delattr(os, "posix_fadvise")
    read_ahead(embedded_model())
