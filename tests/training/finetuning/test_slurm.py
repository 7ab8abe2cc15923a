"""configs/slurm/finetune.sh with two processes on this machine; `srun` and `scontrol` are stand-ins."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.training.finetuning.build import captioned_folder, model_folder

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]
SCRIPT = ROOT / "configs" / "slurm" / "finetune.sh"

# srun: the step's process is the one that Slurm sends signals to.
SRUN = '#!/bin/bash\necho $$ > "$STATE/step"\nwhile [[ $1 == --* ]]; do shift; done\nexec "$@"\n'
SCONTROL = '#!/bin/bash\nif [ "$1" = show ]; then echo localhost; else echo "$@" >> "$STATE/requeued"; fi\n'


def started(tmp, *arguments):
    """The script as Slurm starts it."""
    programs = tmp / "bin"
    programs.mkdir(exist_ok=True)
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    of_slurm = {"SLURM_JOB_NODELIST": "node1", "SLURM_NNODES": "1", "SLURM_JOB_ID": "77", "PROCESSES": "2", "PORT": str(port)}
    path = f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, **of_slurm, "PATH": path, "STATE": str(tmp), "OMP_NUM_THREADS": "1"}
    environment |= {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    with open(tmp / "said", "w", encoding="utf-8") as said:
        return subprocess.Popen(["bash", str(SCRIPT), *map(str, arguments)], env=environment, stdout=said, stderr=said)


def test_a_preempted_job_is_queued_again_and_goes_on(tmp_path):
    run, said = tmp_path / "run", tmp_path / "said"
    options = f"--data {captioned_folder(tmp_path / 'data', 8)} --model {model_folder()} --batch-size 4 --sample-count 0"
    options += " --max-steps 40 --log-every 1 --checkpoint-every 1000"
    job = started(tmp_path, run, *options.split())
    log = run / "log.jsonl"
    while job.poll() is None and not (log.is_file() and log.read_text().count('"loss"') >= 3):
        time.sleep(0.05)
    os.kill(int((tmp_path / "step").read_text()), signal.SIGTERM)
    assert job.wait(300) != 0, said.read_text()
    assert "stopped and saved at step" in said.read_text()
    assert (tmp_path / "requeued").read_text() == "requeue 77\n"
    assert len(list((run / "checkpoints").glob("step-*"))) == 1 and not (run / "result.json").exists()

    (tmp_path / "requeued").unlink()
    assert started(tmp_path, run, *options.split()).wait(300) == 0, said.read_text()
    assert "resumed" in said.read_text() and (run / "lora.safetensors").is_file()
    steps = [entry["step"] for entry in map(json.loads, log.read_text().splitlines()) if "loss" in entry]
    assert steps == list(range(1, 41))
    assert not (tmp_path / "requeued").exists()

    assert started(tmp_path, tmp_path / "other", "--data", tmp_path / "nowhere").wait(300) != 0
    assert not (tmp_path / "requeued").exists()  # nothing was saved, so that it would fail again
