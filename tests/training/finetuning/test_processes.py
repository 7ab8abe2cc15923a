"""The same run by one process and by two (gloo, on a CPU): losses, measurements, decisions and weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests import tiny
from tests.training.finetuning.build import captioned_folder, model_folder, paired_folder, state_of

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}

# The gradients of two half batches are summed in another order; Adam divides them by their own size, so that what is next
# to nothing may go either way by the learning rate.
LOSSES = {"rel": 2e-3, "abs": 2e-4}
WEIGHTS = {"rtol": 2e-3, "atol": 2e-4}


def finetune(out, *options, processes=1, environment=None, fails=False):
    """Run the command; gives what it said."""
    base = f"--out {out} --rank 2 --lr 1e-3 --batch-size 4 --log-every 1 --warmup-steps 2 --decay constant"
    launcher = (*TORCHRUN, "-m") if processes == 2 else ("-m",)
    command = [sys.executable, *launcher, "latentdiff", "finetune", *base.split(), *map(str, options)]
    done = subprocess.run(command, env=ENVIRONMENT | (environment or {}), capture_output=True, text=True, timeout=600)
    assert fails or done.returncode == 0, done.stderr[-3000:]
    assert not fails or done.returncode != 0, done.stdout
    return done.stdout + done.stderr


def log_of(run):
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def assert_same_run(one, two):
    """All that is logged but times and memory, the result's step, and weights and averages."""
    first, second = log_of(one), log_of(two)
    assert [line["step"] for line in first] == [line["step"] for line in second]
    for line, other in zip(first, second, strict=True):
        assert line.keys() == other.keys()
        for name in line.keys() - {"images_per_second", "peak_memory_mb"}:
            close = {"abs": 0.05} if name.endswith("accuracy") else LOSSES  # a share of pairs, some of which are on the edge
            assert other[name] == pytest.approx(line[name], **close), (line["step"], name)
    assert (one / "result.json").read_text() == (two / "result.json").read_text()
    weights, other = state_of(one), state_of(two)
    assert weights.keys() == other.keys()
    for name in weights:
        torch.testing.assert_close(other[name], weights[name], **WEIGHTS, msg=lambda m, n=name: f"{n}: {m}")


@pytest.fixture
def everything(tmp_path):
    """Weights of single images, images for regularization, old prompts that are kept, and a run that ends by itself."""
    folder = captioned_folder(tmp_path / "data", 10)
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    for place, row in enumerate(rows):
        row["weight"] = 0.5 + place % 3
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    reminders = captioned_folder(tmp_path / "known", 6, seed=2)
    return [
        "--model", model_folder(), "--data", folder, "--data", f"{{path: {reminders}, regularization: true}}",
        "--prior-weight", 0.7, "--keep", "old:0.5", "--old-prompts", "a cat", "--old-prompts", "a dog",
        "--validation-share", 0.2, "--validate-every", 2, "--checkpoint-every", 2, "--preview-every", 2,
        "--sample-count", 1, "--sample-steps", 2, "--stop", "auto", "--patience", 1, "--least-kept", 0.9999,
        "--max-steps", 12, "--cache", tmp_path / "cache",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "more",
    [("--method", "lora"), ("--method", "full", "--lr", "1e-5", "--accumulation", "2", "--train-text-encoder")],
    ids=["lora", "full"],
)
def test_with_all_that_a_run_can_heed(tmp_path, everything, more):
    finetune(tmp_path / "one", *everything, *more)
    said = finetune(tmp_path / "two", *everything, *more, processes=2)
    assert_same_run(tmp_path / "one", tmp_path / "two")
    log = log_of(tmp_path / "two")
    assert log[-1]["step"] < 12 and said.count("stopped at step") == 1  # too little was kept, and both stopped
    assert any("old" in line for line in log) and any(0 < line.get("kept", 0) < 1 for line in log)
    assert "6 of them for regularization" in said


@pytest.mark.parametrize("method", ["lora", "full"])
def test_with_pairs(tmp_path, method):
    options = ["--data", paired_folder(tmp_path / "data", 8), "--model", model_folder(), "--loss", "dpo", "--method", method]
    options += ["--validation-share", 0.2, "--validate-every", 2, "--max-steps", 4, "--sample-count", 0]
    options += ["--dpo-beta", 200, "--lr", "3e-4"]
    finetune(tmp_path / "one", *options)
    finetune(tmp_path / "two", *options, processes=2)
    assert_same_run(tmp_path / "one", tmp_path / "two")
    assert {"accuracy", "margin"} <= log_of(tmp_path / "two")[1].keys()


def test_split_over_two_with_all_that_a_run_can_heed(tmp_path, everything):
    """FSDP, which both processes must end at one step, or one waits for the other for ever."""
    everything += ["--method", "full", "--lr", "1e-5"]
    finetune(tmp_path / "one", *everything)
    said = finetune(tmp_path / "two", *everything, processes=2, environment=FSDP)
    assert "split over 2 processes" in said
    assert_same_run(tmp_path / "one", tmp_path / "two")


def test_a_model_of_sdxl_s_shape_split_over_two(tmp_path):
    """Both text encoders, pooled text and sizes, with checkpointed activations; and gone on with by one process alone."""
    data = captioned_folder(tmp_path / "data", 6)
    options = ["--data", data, "--model", tiny.xl_folder(tmp_path), "--method", "full", "--train-text-encoder", "--resolution"]
    options += [64, "--upscale", "--gradient-checkpointing", "--validation-share", 0.2, "--validate-every", 2]
    options += ["--sample-count", 0, "--checkpoint-every", 2, "--cache", tmp_path / "cache"]
    finetune(tmp_path / "one", *options, "--max-steps", 4)
    said = finetune(tmp_path / "two", *options, "--max-steps", 2, processes=2, environment=FSDP)
    assert "split over 2 processes" in said
    finetune(tmp_path / "two", "--resume", tmp_path / "two", "--max-steps", 4)
    assert_same_run(tmp_path / "one", tmp_path / "two")


def test_what_several_processes_refuse(tmp_path):
    options = ["--data", paired_folder(tmp_path / "data", 4), "--model", model_folder(), "--loss", "dpo", "--method", "full"]
    said = finetune(tmp_path / "run", *options, "--dry-run", processes=2, fails=True)
    assert "without accelerate launch or torchrun, with --batch-size 2" in said and not (tmp_path / "run").exists()
    said = finetune(tmp_path / "run", *options, processes=2, environment=FSDP, fails=True)
    assert "which FSDP has in parts only; take DDP" in said


def test_folders_that_not_all_processes_see(tmp_path):
    """Each with a run folder of its own, as on machines without common storage."""
    captioned_folder(tmp_path / "data", 8)
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys\n"
        "from pathlib import Path\n"
        "from latentdiff.training.finetuning.finetune import run\n"
        "from tests.training.finetuning.build import settings\n"
        "tmp = Path(sys.argv[1])\n"
        "changes = {name: tmp / f'{name}{os.environ[\"RANK\"]}' for name in sys.argv[2:]}\n"
        "run(settings(tmp, **changes, **({'cache': tmp / 'cache'} if 'cache' not in changes else {})))\n"
    )

    def said(*own):
        command = [sys.executable, *TORCHRUN, str(script), str(tmp_path), *own]
        done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=600)
        assert done.returncode != 0
        return done.stderr

    assert "rows that other processes made are not in" in said("cache")
    finetune(tmp_path / "out0", "--data", tmp_path / "data", "--model", model_folder(), "--max-steps", 2)
    assert "the main one at step 2; the folder must lie on storage that all machines see" in said("out")
