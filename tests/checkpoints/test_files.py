"""Reading single files: what each damaged or foreign one is called, and that nothing in a pickle is executed."""

from __future__ import annotations

import json
import os
import sys
import types
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from latentdiff.checkpoints.files import TensorFile, read_tensors, sniff
from latentdiff.errors import CheckpointError


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as error:
        read_tensors(path)
    message = str(error.value)
    assert "\n" not in message and path.name in message
    return message


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "empty; download it again"),
        (b"<!DOCTYPE html>\n<html>", "HTML page"),
        (b"\n  <HTML><head>", "HTML page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n", "git lfs pull"),
        (b"\x89PNG\r\n\x1a\n" + bytes(40), "PNG image"),
        (b"GGUF" + bytes(40), "GGUF"),
        (b'{"format": "pt"}', "JSON file"),
        (b"PK\x03\x04" + bytes(40), "truncated torch archive"),
        (bytes(range(64)), "unknown format"),
        (b"\x80\x02", "damaged"),
    ],
)
def test_foreign_files_are_named(tmp_path: Path, content: bytes, words: str):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    assert words in refusal(path)


def test_truncated_safetensors_says_both_sizes(tmp_path: Path):
    path = tmp_path / "model.safetensors"
    save_file({"weight": torch.zeros(1000)}, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    message = refusal(path)
    assert f"promises {len(whole)} bytes, the file has {len(whole) // 2}" in message


def test_safetensors_cut_inside_its_header(tmp_path: Path):
    path = tmp_path / "model.safetensors"
    save_file({"weight": torch.zeros(1000)}, path)
    path.write_bytes(path.read_bytes()[:20])
    assert "header alone" in refusal(path)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.integers(0, 700), flips=st.lists(st.integers(0, 600), max_size=3))
def test_any_damage_is_an_error_of_ours_or_none(tmp_path: Path, cut: int, flips: list[int]):
    """Whatever happens to the bytes, reading gives tensors or one line of ours, never another exception."""
    path = tmp_path / "model.safetensors"
    save_file({"weight": torch.arange(100.0), "bias": torch.zeros(3)}, path, metadata={"a": "b"})
    content = bytearray(path.read_bytes())
    for position in flips:
        content[position % len(content)] ^= 0xFF
    path.write_bytes(content[: len(content) - min(cut, len(content))])
    try:
        assert isinstance(read_tensors(path), TensorFile)
    except CheckpointError as error:
        assert "\n" not in str(error)


def test_zip_that_is_no_checkpoint(tmp_path: Path):
    path = tmp_path / "model.ckpt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")
    assert "zip archive without torch weights" in refusal(path)


class Evil:
    """Runs a command when a careless program unpickles it."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
def test_pickle_with_code_is_refused_by_name_and_not_run(tmp_path: Path, zipped: bool):
    trace, path = tmp_path / "it ran", tmp_path / "model.ckpt"
    state = {"state_dict": {"weight": torch.zeros(2)}, "evil": Evil(f"touch '{trace}'")}
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    assert "system" in refusal(path)
    assert not trace.exists()


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
def test_state_dict_and_counters_are_read_from_a_pickle(tmp_path: Path, zipped: bool):
    path = tmp_path / "model.ckpt"
    weight = torch.randn(3, 4).half()
    torch.save(
        {"state_dict": {"weight": weight}, "global_step": 875_000, "epoch": 2},
        path,
        _use_new_zipfile_serialization=zipped,
    )
    file = read_tensors(path)
    assert torch.equal(file.tensors["weight"], weight) and file.tensors["weight"].dtype == torch.float16
    assert file.others["global_step"] == 875_000


def test_lightning_leftovers_do_not_hinder(tmp_path: Path):
    """Callback classes and their states, as SD 1.x training checkpoints hold them, become inert stand-ins."""
    path = tmp_path / "model.ckpt"
    module = types.ModuleType("pytorch_lightning.callbacks.model_checkpoint")
    parents = [types.ModuleType("pytorch_lightning"), types.ModuleType("pytorch_lightning.callbacks")]
    callback = type("ModelCheckpoint", (), {"__module__": module.__name__})
    module.ModelCheckpoint = callback
    sys.modules |= {m.__name__: m for m in (*parents, module)}
    try:
        instance = callback()
        instance.best = 0.5
        torch.save({"state_dict": {"w": torch.ones(2)}, "callbacks": {callback: {"best": 1}}, "x": instance}, path)
    finally:
        for m in (*parents, module):
            del sys.modules[m.__name__]
    assert torch.equal(read_tensors(path).tensors["w"], torch.ones(2))


def test_pickle_of_something_else(tmp_path: Path):
    path = tmp_path / "model.ckpt"
    torch.save([torch.zeros(2)], path)
    assert "holds a list" in refusal(path)
    torch.save({"state_dict": 3}, path)
    assert "state_dict that is a int" in refusal(path)


def test_safetensors_are_mapped_not_read(tmp_path: Path):
    """Loading a large file takes no memory of its own until the tensors are touched."""
    psutil = pytest.importorskip("psutil")
    path = tmp_path / "model.safetensors"
    save_file({str(i): torch.zeros(4 * 2**20) for i in range(8)}, path)  # 128 MiB
    process = psutil.Process()
    before = process.memory_info().rss
    file = read_tensors(path)
    assert len(file.tensors) == 8
    assert process.memory_info().rss - before < 32 * 2**20


def test_metadata_is_kept(tmp_path: Path):
    path = tmp_path / "model.safetensors"
    save_file({"w": torch.zeros(1)}, path, metadata={"note": json.dumps({"a": 1})})
    assert json.loads(read_tensors(path).metadata["note"]) == {"a": 1}
    assert sniff(path) == "safetensors"
