"""Checkpoints of a run: whole or not there at all.

    STAGE/checkpoints/step-00001000/
        weights.safetensors   what is trained
        ema.safetensors       its averages
        optimizer.safetensors moments, as "WEIGHT/MOMENT"
        state.json            step, settings, data
        manifest.json         sizes of the files above; written last

A checkpoint is written under another name, flushed and renamed, and older ones go only after that. Random states are
not
needed: everything random is a function of the step.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from latentdiff.checkpoints.writing import write_safetensors
from latentdiff.errors import CheckpointError, DataError
from latentdiff.reading.json import read_object
from latentdiff.reading.safetensors import read_header

_MANIFEST = "manifest.json"
_REMEDY = "delete that checkpoint, and the run goes on from the one before it"


@dataclass(frozen=True)
class Checkpoint:
    """All that a stage needs to go on after `step` finished steps."""

    step: int
    weights: Mapping[str, Tensor]
    ema: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    state: Mapping[str, Any]


def save_checkpoint(folder: Path, checkpoint: Checkpoint, *, keep: int, spare: Collection[int] = ()) -> Path:
    """Write a checkpoint below `folder`, then remove all but the newest `keep` and those of the steps to `spare`.

    Raises:
        DataError: the disk is too full, or the folder cannot be written to. Nothing is lost then.
    """
    final = folder / f"step-{checkpoint.step:08d}"
    temporary = folder / f".writing-{final.name}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for killed in folder.glob(".writing-*"):
            shutil.rmtree(killed)
        temporary.mkdir()
        check_space(folder, sum(map(_bytes, (checkpoint.weights, checkpoint.ema, checkpoint.optimizer))))
        _write(temporary, checkpoint)
        if final.exists():
            shutil.rmtree(final)
        os.replace(temporary, final)
        _flush(folder)
    except OSError as error:
        raise DataError(
            f"cannot write the checkpoint {final}: {error.strerror or error}; the one before is untouched"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    for old in _candidates(folder)[keep:]:
        if int(old.name.removeprefix("step-")) not in spare:
            shutil.rmtree(old)
    return final


def whole_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints that are whole, newest first."""
    return [path for path in _candidates(folder) if _fault(path) is None]


def newest_checkpoint(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint, and for each newer one that was passed over, why."""
    skipped = []
    for path in _candidates(folder):
        if (fault := _fault(path)) is None:
            return path, skipped
        skipped.append(f"{path}: {fault}")
    return None, skipped


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint to the CPU.

    Raises:
        CheckpointError: it is not whole.
    """
    if fault := _fault(path):
        raise CheckpointError(f"the checkpoint {path} is not whole: {fault}")
    state = read_object(path / "state.json", remedy=_REMEDY)
    if type(state.get("step")) is not int or state["step"] < 0:
        raise CheckpointError(f"{path / 'state.json'} needs a step of 0 or more; {_REMEDY}")
    tensors = {name: _tensors(path / f"{name}.safetensors") for name in ("weights", "ema", "optimizer")}
    return Checkpoint(step=state["step"], state=state, **tensors)


def _tensors(path: Path) -> dict[str, Tensor]:
    read_header(path)  # which says what is wrong with it
    return load_file(path)  # a copy: the file may be removed while it is in use


def check_space(folder: Path, needed: int) -> None:
    """Refuse to write `needed` bytes below `folder` where they do not fit.

    Raises:
        DataError: the disk is too full.
    """
    free = shutil.disk_usage(folder).free
    if free < needed * 1.1:
        raise DataError(f"{folder} needs {needed / 1e6:.0f} MB free, found {free / 1e6:.0f} MB; free some space")


def _write(folder: Path, checkpoint: Checkpoint) -> None:
    write_safetensors(checkpoint.weights, folder / "weights.safetensors")
    write_safetensors(checkpoint.ema, folder / "ema.safetensors")
    write_safetensors(checkpoint.optimizer, folder / "optimizer.safetensors")
    (folder / "state.json").write_text(json.dumps({**checkpoint.state, "step": checkpoint.step}, indent=1))
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    for name in sizes:
        _flush(folder / name)
    (folder / _MANIFEST).write_text(json.dumps({"sizes": sizes}))
    _flush(folder / _MANIFEST)
    _flush(folder)


def _fault(path: Path) -> str | None:
    try:
        sizes = read_object(path / _MANIFEST)["sizes"]
        for name, size in sizes.items():
            if (found := (path / name).stat().st_size) != size:
                return f"{name} has {found} bytes, expected {size}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, CheckpointError) as error:
        return f"no usable {_MANIFEST} or a file is missing ({type(error).__name__})"
    return None


def _candidates(folder: Path) -> list[Path]:
    """Folders of checkpoints, newest first."""
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted(
        (path for path in found if re.fullmatch(r"step-\d{8,}", path.name)), key=lambda path: -int(path.name[5:])
    )


def _bytes(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
