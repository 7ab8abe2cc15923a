from __future__ import annotations

import json
from datetime import datetime, timedelta

import pytest

from latentdiff.training.report.log import RunLog
from tests.scenes import FEW  # the tools' folder is on the path from here on

import measure_finetuning  # noqa: E402, isort: skip


def study(folder, ends=None):
    return measure_finetuning.Study(folder, FEW, None, None, ends)


def test_what_is_known_is_not_measured_again_and_nothing_begins_too_late(tmp_path):
    asked = []

    def how():
        asked.append(1)
        return {"seconds": 2.0}

    study(tmp_path).measure("stop", "a", how)
    study(tmp_path).measure("stop", "a", how)
    study(tmp_path, datetime.now() - timedelta(seconds=1)).measure("stop", "b", how)
    assert len(asked) == 1 and list(study(tmp_path).found("stop")) == ["a"]
    study(tmp_path, datetime.now() + timedelta(hours=1)).measure("stop", "b", how)
    assert study(tmp_path).found("stop")["b"]["seconds"] == 2.0 and not study(tmp_path).found("dpo")


def log(losses, copies=()):
    """A run whose held-out loss was so every 50 steps, from step 0 on."""
    points = [(50 * number, loss) for number, loss in enumerate(losses)]
    return RunLog({"val_0_500": points, "kept": [(step, 1.0) for step, _ in points], "copies": list(copies)})


def test_a_run_is_decided_by_what_its_log_said_at_that_time():
    """Three measurements without a better one end a run: what comes later cannot change its mind."""
    step, at, why = measure_finetuning.decided(log([1.0, 0.6, 0.7, 0.7, 0.7, 0.1]))
    assert (step, at) == (50, 200) and "3 measurements" in why
    assert measure_finetuning.decided(log([1.0, 0.6, 0.7, 0.5, 0.4]))[:2] == (200, 200)
    assert measure_finetuning.decided(log([1.0, 0.6, 0.5, 0.4], [(150, 2.0)]))[:2] == (100, 150)


def test_a_time_is_the_next_one():
    now = datetime.now()
    for minutes in (-5, 5):
        at = measure_finetuning._time(f"{now + timedelta(minutes=minutes):%H:%M}")
        assert now < at <= now + timedelta(days=1)
    assert measure_finetuning._time(None) is None


def test_tables_tell_every_figure(tmp_path):
    score = {"value": 0.9, "low": 0.8, "high": 0.95, "images": 90}
    rows = [
        {"part": "concepts", "name": "teapot", "seconds": 240.0, "kept": 0.99, "scores": {"after": score}},
        {"part": "dpo", "name": "weakest", "task": "counting", "pairs": 5, "scores": {"counting": score}},
        {
            "part": "stop",
            "name": "teapot-0",
            "scores": {"50": 0.5, "100": 0.7},
            "chosen": 50,
            "stopped_at": 100,
            "gap": 0.2,
        },
    ]
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = measure_finetuning.tables(study(tmp_path))
    assert "| teapot | 4.0 |  | 0.900 (0.800 to 0.950, n = 90) |" in found
    assert "DPO on counting, 5 pairs" in found and "| teapot-0 | 50: 0.50, 100: 0.70 | 50 | 100 | 0.200 |" in found


def test_a_command_that_fails_says_where_the_reason_is(tmp_path):
    with pytest.raises(measure_finetuning.LatentDiffError, match=r"failed; .*a\.log says why"):
        measure_finetuning.run_command(["false"], tmp_path / "a.log")
