import json

import pytest
import torch
from PIL import Image

from latentdiff.training.journal import Journal, Window


def test_lines_after_the_resumed_step_are_dropped(tmp_path):
    path = tmp_path / "log.jsonl"
    journal = Journal(path, 0, enabled=True)
    for step in (10, 20, 30):
        journal.write({"step": step, "loss": 0.5})
    with open(path, "a") as file:
        file.write('{"step": 40, "lo')  # killed while writing
    Journal(path, 20, enabled=True).write({"step": 30, "loss": 0.25})
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 10, "loss": 0.5}, {"step": 20, "loss": 0.5}, {"step": 30, "loss": 0.25},
    ]  # fmt: skip


def test_what_is_measured_again_is_dropped(tmp_path):
    path = tmp_path / "log.jsonl"
    journal = Journal(path, 0, enabled=True)
    for entry in ({"step": 0, "val_mse": 1.0}, {"step": 10, "loss": 0.5}, {"step": 10, "val_mse": 0.5}):
        journal.write(entry)
    Journal(path, 10, enabled=True)
    assert len(path.read_text().splitlines()) == 3
    Journal(path, 10, enabled=True, measure_again=True)
    assert [json.loads(line) for line in path.read_text().splitlines()][1:] == [{"step": 10, "loss": 0.5}]


def test_only_the_main_process_writes(tmp_path):
    Journal(tmp_path / "log.jsonl", 0, enabled=False).write({"step": 1})
    assert not (tmp_path / "log.jsonl").exists()


def test_window_means_and_late_parts():
    window = Window()
    window.add({"loss": torch.tensor(1.0)})
    window.add({"loss": torch.tensor(3.0), "adversarial": torch.tensor(5.0)})
    means, rate = window.close()
    assert {name: value.item() for name, value in means.items()} == {"loss": 2.0, "adversarial": 5.0}
    assert rate > 0 and len(window) == 0


@pytest.mark.parametrize("name", ["loss", "grad_norm", "grad_norm_vae"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_the_first_step_that_is_not_finite_is_found(name, value):
    window = Window()
    assert window.first_not_finite() is None
    for number in (1.0, 2.0, value, value):
        window.add({"loss": torch.tensor(0.5), name: torch.tensor(number), "kl": torch.tensor(0.0)})
    assert window.first_not_finite() == 2


class Broken:
    """A tracker whose service fails after the first entry."""

    place = "nowhere"

    def __init__(self, run, settings):
        self.got = []

    def write(self, entry):
        if self.got:
            raise ConnectionError("the network is gone")
        self.got.append(entry)

    def image(self, name, image, step):
        self.got.append((name, image.size, step))

    def close(self):
        raise AssertionError("closed after it failed")


def test_a_tracker_that_fails_is_told_once_and_left_out(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("latentdiff.training.journal.WandB", Broken)
    sheet = tmp_path / "samples" / "step-00000001" / "ema" / "sheet.png"
    sheet.parent.mkdir(parents=True)
    Image.new("RGB", (8, 4)).save(sheet)
    journal = Journal(tmp_path / "log.jsonl", 0, enabled=True, tracked={"lr": 1.0})
    tracker = journal._trackers[0]
    for step in (1, 2, 3):
        journal.write({"step": step, "loss": 0.5})
        journal.show(step)
    journal.close()
    assert tracker.got == [{"step": 1, "loss": 0.5}, ("ema", (8, 4), 1)]
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 3
    said = capsys.readouterr()
    assert said.err.count("note: Broken fails and gets no more of this run: the network is gone") == 1
    assert "Weights & Biases: nowhere" in said.out


def test_sheets_reach_tensorboard(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    sheet = tmp_path / "samples" / "step-00000001" / "raw" / "sheet.png"
    sheet.parent.mkdir(parents=True)
    Image.new("RGB", (8, 4)).save(sheet)
    journal = Journal(tmp_path / "log.jsonl", 0, enabled=True)
    journal.write({"step": 1, "loss": 0.5})
    journal.show(1)
    journal.close()
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Images("samples/raw")[0].step == 1
