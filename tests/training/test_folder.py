import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from latentdiff.errors import DataError, UsageError
from latentdiff.training.folder import clean, owned

ROOT = Path(__file__).parents[2]
HOLD = """
import sys
from pathlib import Path
from latentdiff.training.folder import owned
with owned(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def holder(folder):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout.readline() == b"held\n"
    return process


def test_the_holder_is_named_and_a_killed_one_holds_nothing(tmp_path):
    process = holder(tmp_path)
    with pytest.raises(UsageError, match=rf"is in use by process {process.pid} on .*, since \d{{4}}-.*; wait until"):
        with owned(tmp_path):
            pass
    process.kill()
    process.wait()
    for _ in range(2):  # and whoever ends lets go
        with owned(tmp_path):
            pass


def test_other_processes_of_a_run_pass(tmp_path):
    with owned(tmp_path), owned(tmp_path, main=False):
        pass


def test_what_killed_programs_left_is_removed(tmp_path):
    left = [".log-a1b2c3d4.jsonl", "samples/.00-abcdefgh.png", "cache/x/.old-abcd_123.safetensors"]
    kept = [
        ".lock",
        ".hidden",
        "log.jsonl",
        "cache/x/.new-abcd_123.safetensors",
        "checkpoints/step-00000001/state.json",
    ]
    for name in [*left, *kept, "checkpoints/.writing-step-00000002/ema.safetensors"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    os.utime(tmp_path / left[2], (time.time() - 7200,) * 2)
    clean(tmp_path)
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()) == sorted(kept)


def test_a_folder_that_cannot_be_written_to(tmp_path):
    (tmp_path / "run").write_text("a file")
    with pytest.raises(DataError, match="cannot write to the run folder"), owned(tmp_path / "run"):
        pass
