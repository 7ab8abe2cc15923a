"""Runs for Weights & Biases, offline, read again from what it would send."""

from __future__ import annotations

import os
import platform
import struct
import sys
import time

import pytest
from PIL import Image

from latentdiff.errors import ConfigError, MissingDependencyError
from latentdiff.training.report.wandb_run import WandB, check_installed


@pytest.fixture
def offline(monkeypatch):
    pytest.importorskip("wandb")
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_MODE", "offline")


def records_of(folder, patience=30.0):
    """The file of an offline run, and what lies in it. The service behind wandb may write the last of it, with the
    exit, a moment after `finish` has returned."""
    (path,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    until = time.monotonic() + patience
    records = read_log(path.read_bytes())
    while not any(record.HasField("exit") for record in records) and time.monotonic() < until:
        time.sleep(0.05)
        records = read_log(path.read_bytes())
    return path, records


def read_log(data):
    """Records from a log as LevelDB writes it, in blocks of 32 KiB; up to one that is not whole yet."""
    from wandb.proto import wandb_internal_pb2

    place, part, records = 7, b"", []
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        if place + 7 + length > len(data):
            break
        part += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last of several
            record = wandb_internal_pb2.Record()
            record.ParseFromString(part)
            records.append(record)
            part = b""
    return records


def test_entries_images_and_configuration_arrive_and_nothing_about_the_machine(tmp_path, offline):
    run = tmp_path / "teapot"
    run.mkdir()
    tracker = WandB(run, {"lr": 1e-3, "data": ["pictures"]})
    tracker.write({"step": 20, "loss": 0.5})
    tracker.write({"step": 20, "val_mse": 0.75})
    tracker.image("ema", Image.new("RGB", (8, 4), "red"), 20)
    tracker.close()
    assert "offline; send it with: wandb sync" in tracker.place
    path, records = records_of(run)
    (started,) = [record.run for record in records if record.HasField("run")]
    assert (started.project, started.display_name, started.host) == ("latentdiff", "teapot", "")
    config = {item.key: item.value_json for item in started.config.update if item.key != "_wandb"}
    assert config == {"lr": "0.001", "data": '["pictures"]'}
    logged = [
        {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
        for record in records
        if record.HasField("history")
    ]
    assert {"step": "20", "training/loss": "0.5"}.items() <= logged[0].items()
    assert logged[1]["loss at fixed noise/val_mse"] == "0.75"
    assert any(name.startswith("samples/ema") for name in logged[2])
    assert len(list(path.parent.glob("files/media/images/samples/*.png"))) == 1
    sent = path.read_bytes()
    for private in (str(tmp_path), os.getcwd(), sys.executable, platform.node()):
        assert private.encode() not in sent or len(private) < 4, private


def test_a_run_that_goes_on_has_the_same_id(tmp_path, offline):
    ids = []
    for _ in range(2):
        tracker = WandB(tmp_path, {})
        ids.append(tracker._run.id)
        tracker.close()
    assert ids[0] == ids[1]


def test_what_is_missing_is_said(tmp_path, monkeypatch, offline):
    import wandb

    def refuse(**_):
        raise wandb.errors.UsageError("api_key not configured")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(
        ConfigError, match="api_key not configured; log in with `wandb login`, or set WANDB_MODE=offline"
    ):
        WandB(tmp_path, {})


def test_the_missing_package_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'latentdiff\[wandb\]'"):
        check_installed()
