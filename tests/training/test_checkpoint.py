import shutil
from pathlib import Path

import pytest
import torch

from latentdiff.errors import CheckpointError, DataError
from latentdiff.training import checkpoint as module
from latentdiff.training.checkpoint import Checkpoint, load_checkpoint, newest_checkpoint, save_checkpoint

FILES = ("weights.safetensors", "ema.safetensors", "optimizer.safetensors", "state.json", "manifest.json")


def made(step):
    tensors = {
        "a": torch.full((4, 3), float(step)),
        "kernel": torch.randn(2, 3, 2, 2).to(memory_format=torch.channels_last),
    }
    return Checkpoint(step, tensors, {"a": torch.zeros(1)}, {"a/exp_avg": torch.ones(4, 3)}, {"lr": 0.1})


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_what_is_saved_is_loaded(tmp_path):
    saved = made(7)
    loaded = load_checkpoint(save_checkpoint(tmp_path, saved, keep=2))
    assert loaded.step == 7 and loaded.state["lr"] == 0.1
    for part in ("weights", "ema", "optimizer"):
        before, after = getattr(saved, part), getattr(loaded, part)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)


def test_only_the_newest_stay(tmp_path):
    for step in (5, 100, 20):
        save_checkpoint(tmp_path, made(step), keep=2)
    assert names(tmp_path) == ["step-00000020", "step-00000100"]
    assert newest_checkpoint(tmp_path) == (tmp_path / "step-00000100", [])


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["missing", "truncated", "empty"])
def test_a_damaged_checkpoint_is_passed_over(tmp_path, name, damage):
    save_checkpoint(tmp_path, made(1), keep=2)
    path = save_checkpoint(tmp_path, made(2), keep=2) / name
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-1] if damage == "truncated" else b"")
    newest, skipped = newest_checkpoint(tmp_path)
    assert newest == tmp_path / "step-00000001"
    assert len(skipped) == 1 and "step-00000002" in skipped[0]
    with pytest.raises(CheckpointError, match="not whole"):
        load_checkpoint(path.parent)


def test_nothing_there(tmp_path):
    assert newest_checkpoint(tmp_path / "none") == (None, [])


@pytest.mark.parametrize("moment", ["write_safetensors", "_flush", "os.replace"])
def test_a_failure_while_writing_leaves_the_one_before(tmp_path, monkeypatch, moment):
    save_checkpoint(tmp_path, made(1), keep=1)

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.os if "." in moment else module, moment.split(".")[-1], fail)
    with pytest.raises(DataError, match="No space left on device; the one before is untouched"):
        save_checkpoint(tmp_path, made(2), keep=1)
    assert names(tmp_path) == ["step-00000001"]
    assert load_checkpoint(tmp_path / "step-00000001").step == 1


def test_old_ones_go_only_after_the_new_one_is_in_place(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, made(1), keep=1)
    removed = []
    remove = shutil.rmtree

    def watch(path, **options):
        if Path(path).name == "step-00000001":
            removed.append(newest_checkpoint(tmp_path)[0].name)
        remove(path, **options)

    monkeypatch.setattr(module.shutil, "rmtree", watch)
    save_checkpoint(tmp_path, made(2), keep=1)
    assert removed == ["step-00000002"]


def test_leftovers_of_a_killed_process_are_removed(tmp_path):
    (tmp_path / ".writing-step-00000001").mkdir()
    save_checkpoint(tmp_path, made(2), keep=1)
    assert names(tmp_path) == ["step-00000002"]


def test_no_space(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, made(1), keep=1)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 100})())
    with pytest.raises(DataError, match="free some space"):
        save_checkpoint(tmp_path, made(2), keep=1)
    assert names(tmp_path) == ["step-00000001"]


DAMAGE = {
    "a deep state": ("state.json", lambda content: b"[" * len(content)),
    "a step that is none": ("state.json", lambda content: content.replace(b'"step": 2', b'"step":-2')),
    "a header that lies": ("weights.safetensors", lambda content: content.replace(b"F32", b"F64")),
    "a manifest that is a list": ("manifest.json", lambda content: b"[]"),
    "a manifest without an end": ("manifest.json", lambda content: b'{"sizes": ' + b"[" * 5000),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_that_leaves_the_size_ends_in_one_line(tmp_path, damage):
    path = save_checkpoint(tmp_path, made(2), keep=2)
    name, change = DAMAGE[damage]
    (path / name).write_bytes(change((path / name).read_bytes()))
    with pytest.raises(CheckpointError, match=name.split(".")[0]):
        load_checkpoint(path)
