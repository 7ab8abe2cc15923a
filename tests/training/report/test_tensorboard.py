from __future__ import annotations

import sys
import time

import pytest
from PIL import Image

from latentdiff.errors import MissingDependencyError
from latentdiff.training.report.tensorboard import TensorBoard


def read(run):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(run / "tensorboard"), purge_orphaned_data=True)
    events.Reload()
    return events


def test_entries_and_sheets_are_read_by_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    with TensorBoard(tmp_path) as board:
        board.write({"step": 20, "loss": 0.5, "lr": 1e-3})
        board.write({"step": 20, "val_mse": 0.75, "gap": 0.25})
        board.image("ema", Image.new("RGB", (8, 4), "red"), 20)
    events = read(tmp_path)
    assert set(events.Tags()["scalars"]) == {
        "training/loss", "training/lr", "loss at fixed noise/val_mse", "loss at fixed noise/gap",
    }  # fmt: skip
    (point,) = events.Scalars("training/loss")
    assert (point.step, point.value) == (20, 0.5)
    (image,) = events.Images("samples/ema")
    assert (image.step, image.width, image.height) == (20, 8, 4)


def test_a_resumed_run_hides_what_was_lost(tmp_path):
    pytest.importorskip("tensorboard")
    with TensorBoard(tmp_path) as board:
        for step in (10, 20, 30):
            board.write({"step": step, "loss": 1.0})
    time.sleep(1.1)  # files are read in the order of their names, which begin with the second
    with TensorBoard(tmp_path, step=10) as board:
        board.write({"step": 20, "loss": 2.0})
    points = [(point.step, point.value) for point in read(tmp_path).Scalars("training/loss")]
    assert points == [(10, 1.0), (20, 2.0)]


def test_the_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    with pytest.raises(MissingDependencyError, match=r"pip install 'latentdiff\[tensorboard\]'"):
        TensorBoard(tmp_path)
