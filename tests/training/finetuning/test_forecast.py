"""A dry run against the run itself."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from latentdiff.cli import cli
from latentdiff.errors import UsageError
from latentdiff.training.finetuning import trial
from latentdiff.training.finetuning.forecast import Forecast, duration, remedies, times_due
from tests.training.finetuning.build import model_folder, settings

# Of the kernel's two peaks, ru_maxrss begins with that of the process which started this one.
MEASURED = """
from pathlib import Path
from latentdiff.cli import run
try:
    run()
finally:
    lines = Path("/proc/self/status").read_text().splitlines()
    print("peak", 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")))
"""


IMAGES = 12


def test_what_is_due_is_counted_as_the_loop_does_it():
    for every in (1, 3, 4):
        for first in range(9):
            for last in range(first, 10):
                done = [step for step in range(first + 1, last + 1) if step % every == 0 or step == last]
                assert times_due(every, first, last) == len(done), (every, first, last)


def test_a_remedy_is_a_setting_that_fits_and_no_other():
    # 0.95 of 200 are free: 100 + 4 rows of 20 fit, 8 do not; checkpointed rows of 5 all do.
    assert remedies(100, 20, 8, 2, 200, {"--gradient-checkpointing": (110, 5)}) == (
        "--accumulation 4",
        "--gradient-checkpointing",
    )
    assert remedies(100, 200, 8, 1, 200, {"--a": (150, 20), "--b": (191, 0)}) == ("--a --accumulation 4",)
    assert remedies(100, 1, 8, 1, 200, {}) == ()  # it fits as it is


@pytest.mark.parametrize("seconds, said", [(4.24, "4.2 s"), (42, "42 s"), (200.4, "3 min 20 s"), (7500, "2 h 05 min")])
def test_durations(seconds, said):
    assert duration(seconds) == said


def test_what_does_not_fit_is_said_with_what_would():
    found = Forecast(10, 2.0, {}, {"weights": 900}, 500, {"checkpoints": 5}, 100, 5, ("--accumulation 2",))
    assert not found.fits and found.fits_disk
    assert any("with one of these: --accumulation 2" in line for line in found.lines())
    full = Forecast(10, 2.0, {"steps": 1.0}, {"weights": 1}, None, {"checkpoints": 92}, 100, 46)
    assert full.fits_memory and not full.fits_disk  # while the second checkpoint is written
    assert any("--keep-checkpoints 1" in line for line in full.lines())


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells a process's own peak")
def test_memory_and_disk_are_those_of_the_run(tmp):
    given = {
        "data": tmp / "data", "model": model_folder(), "out": tmp / "run", "rank": 256, "max-steps": 12, "batch-size": 4,
        "sample-count": 2, "sample-steps": 2, "checkpoint-every": 4, "preview-every": 6, "device": "cpu",
    }  # fmt: skip
    words = ["finetune", *(f"--{name}={value}" for name, value in given.items())]

    def said(*more):
        done = subprocess.run(
            [sys.executable, "-c", MEASURED, *words, *more], capture_output=True, text=True, check=True
        )
        return done.stdout

    foretold = said("--dry-run")
    assert not (tmp / "run").exists()
    assert "steps: 12, in which each image is seen 4 times" in foretold and "it fits" in foretold
    peak = float(re.search(r"peak (\d+)", said())[1])
    assert _bytes(re.search(r"memory: (\S+ \S+) at most", foretold)[1]) == pytest.approx(peak, rel=0.15)
    disk = sum(path.stat().st_size for path in (tmp / "run").rglob("*") if path.is_file())
    assert _bytes(re.search(r"disk: (\S+ \S+) of", foretold)[1]) == pytest.approx(disk, rel=0.15)


def _bytes(said):
    number, unit = said.split()
    return float(number) * {"MiB": 2**20, "GiB": 2**30}[unit]


def test_a_run_that_does_not_fit_is_not_tried(tmp, monkeypatch):
    used = []
    monkeypatch.setattr(trial, "available_memory", lambda device: 0)
    monkeypatch.setattr(trial.Trainer, "replay", lambda self, until: used.append(until))
    found = trial.dry_run(settings(tmp, method="full"))
    assert not found.fits_memory and not found.seconds and not used
    assert not (tmp / "run").exists()
    assert sum(found.memory.values()) > found.free_memory


def test_a_run_that_goes_on_has_its_rest_to_do(tmp, monkeypatch):
    folder = tmp / "run" / "checkpoints" / "step-00000004"
    folder.mkdir(parents=True)
    (folder / "state.json").write_text("{}")
    (folder / "manifest.json").write_text(json.dumps({"sizes": {"state.json": 2}}))
    before = sorted((tmp / "run").rglob("*"))
    found = trial.dry_run(settings(tmp, max_steps=10))
    assert found.steps == 6 and found.passes == pytest.approx(6 * 4 / 12)
    assert sorted((tmp / "run").rglob("*")) == before


def test_a_dry_run_takes_no_steps_again(tmp):
    arguments = ["finetune", "--resume", str(tmp / "run"), "--verify-resume", "2", "--dry-run"]
    result = CliRunner().invoke(cli, arguments)
    assert isinstance(result.exception, UsageError) and "leave out --verify-resume or --dry-run" in str(
        result.exception
    )
