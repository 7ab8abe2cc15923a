"""The loop, on a task so small that every number can be checked: a linear layer that learns a linear map."""

import json
import os
import signal
import time

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn

from latentdiff.errors import CheckpointError, ConfigError, DataError, NotFiniteError, UsageError
from latentdiff.training.checkpoint import load_checkpoint, newest_checkpoint
from latentdiff.training.data.randomness import normal
from latentdiff.training.loop import Trainer, TrainingStopped
from latentdiff.training.optimizer import ParameterGroup
from latentdiff.training.replay import verify_resume
from latentdiff.training.sections import StageSection
from latentdiff.training.task import Task


class Linear(Task):
    def __init__(self, batch_size=8, *, poisoned=None, on_step=None, width=3):
        torch.manual_seed(0)
        self.fingerprint = "linear"
        self.layer = nn.Linear(width, 2)
        self.module = _Loss(self.layer, on_step)
        self.size, self.poisoned, self.width = batch_size, poisoned, width
        self.previews = []

    def parameter_groups(self):
        return [ParameterGroup("all", dict(self.layer.named_parameters()))]

    def batch(self, step, rows):
        x = normal((0, step), rows, (self.width,))
        if step == self.poisoned:
            x = x * np.nan
        return {"x": x, "y": x[:, :2] * 2 + 1}

    def sources(self, step):
        return [f"{step}-{row}.png" for row in range(self.size)]

    def validate(self):
        return {"weight": self.layer.weight.sum().item()}

    def preview(self, folder, step):
        self.previews.append(step)


class _Loss(nn.Module):
    def __init__(self, layer, on_step):
        super().__init__()
        self.layer, self.on_step = layer, on_step or (lambda step: None)

    def forward(self, batch, step):
        self.on_step(step)
        return {"loss": (self.layer(batch["x"]) - batch["y"]).square().mean()}


def settings(**changes):
    base = {
        "max_steps": 20, "batch_size": 8, "lr": 0.05, "warmup_steps": 3, "mixed_precision": "no", "log_every": 5,
        "validate_every": 10, "preview_every": 10, "checkpoint_every": 7, "ema_every": 2, "ema_decay": 0.9,
    }  # fmt: skip
    return StageSection(**{**base, **changes})


def trainer(folder, task=None, **changes):
    return Trainer(task or Linear(), settings(**changes), folder, Accelerator(cpu=True))


def state_of(folder):
    checkpoint = load_checkpoint(newest_checkpoint(folder / "checkpoints")[0])
    return {**checkpoint.weights, **{f"ema {k}": v for k, v in checkpoint.ema.items()}, **checkpoint.optimizer}


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def assert_same(first, second, **tolerance):
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], **(tolerance or {"rtol": 0, "atol": 0}))


def test_learns_and_writes_down_what_it_did(tmp_path):
    task = Linear()
    trainer(
        tmp_path, task, max_steps=300, lr=0.1, checkpoint_every=100, log_every=50, validate_every=150, preview_every=150
    ).fit()
    entries = log_of(tmp_path)
    losses = [entry["loss"] for entry in entries if "loss" in entry]
    assert losses[-1] < 1e-3 * losses[0]
    assert [entry["step"] for entry in entries if "weight" in entry] == [150, 300]
    assert {"step", "loss", "grad_norm", "lr", "images_per_second"} <= entries[0].keys()
    assert task.previews == [150, 300]
    assert [path.name for path in sorted((tmp_path / "checkpoints").iterdir())] == ["step-00000200", "step-00000300"]


def test_validation_sees_the_averaged_weights_and_training_goes_on_with_the_live_ones(tmp_path):
    task = Linear()
    run = trainer(tmp_path, task, validate_every=20)
    run.fit()
    average = sum(run.ema.average["weight"].flatten().tolist())
    assert log_of(tmp_path)[-1]["weight"] == pytest.approx(average, rel=1e-5)
    assert torch.equal(task.layer.weight, state_of(tmp_path)["weight"])
    assert not torch.equal(task.layer.weight, run.ema.average["weight"])


@pytest.mark.parametrize("stop", [1, 7, 10, 19])
def test_stopped_and_resumed_equals_unbroken(tmp_path, stop):
    trainer(tmp_path / "whole").fit()
    trainer(tmp_path / "parts", max_steps=stop, decay="constant").fit()
    trainer(tmp_path / "whole-constant", decay="constant").fit()
    trainer(tmp_path / "parts", decay="constant").fit()
    assert_same(state_of(tmp_path / "parts"), state_of(tmp_path / "whole-constant"))
    # The comparison can fail: another schedule gives other weights.
    assert not torch.equal(state_of(tmp_path / "whole")["weight"], state_of(tmp_path / "parts")["weight"])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_first_and_nothing_is_lost(tmp_path, number):
    def interrupt(step):
        if step == 8:
            os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    with pytest.raises(TrainingStopped, match="saved at step 9 of 20") as stopped:
        trainer(tmp_path / "parts", Linear(on_step=interrupt)).fit()
    assert stopped.value.exit_code == 130
    assert signal.getsignal(number) is before
    assert newest_checkpoint(tmp_path / "parts" / "checkpoints")[0].name == "step-00000009"
    trainer(tmp_path / "parts").fit()
    trainer(tmp_path / "whole").fit()
    assert_same(state_of(tmp_path / "parts"), state_of(tmp_path / "whole"))
    steps = [entry["step"] for entry in log_of(tmp_path / "parts") if "loss" in entry]
    assert steps == [5, 9, 10, 15, 20]


def test_a_second_signal_is_obeyed_at_once(tmp_path):
    def interrupt_twice(step):
        if step == 3:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)

    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path, Linear(on_step=interrupt_twice)).fit()


def test_accumulation_equals_the_large_batch(tmp_path):
    trainer(tmp_path / "large").fit()
    trainer(tmp_path / "micro", accumulation=4).fit()
    assert_same(state_of(tmp_path / "micro"), state_of(tmp_path / "large"), rtol=1e-4, atol=1e-6)


def test_batch_must_divide(tmp_path):
    with pytest.raises(ConfigError, match="batch_size 8 must be divisible by processes x accumulation = 1 x 3"):
        trainer(tmp_path, accumulation=3)


def test_a_loss_that_is_not_finite_stops_with_step_and_files(tmp_path):
    task = Linear(poisoned=16)
    with pytest.raises(NotFiniteError, match=r"step 16 is not finite.* 16-0\.png, .*step-00000014 is from before"):
        trainer(tmp_path, task).fit()
    assert all(value.isfinite().all() for value in state_of(tmp_path).values())


def test_never_a_checkpoint_after_the_loss_has_gone(tmp_path):
    with pytest.raises(NotFiniteError, match="there is no checkpoint yet"):
        trainer(tmp_path, Linear(poisoned=1), log_every=100, checkpoint_every=2).fit()
    assert not (tmp_path / "checkpoints").exists()


def test_a_damaged_checkpoint_is_skipped_aloud(tmp_path, capsys):
    trainer(tmp_path).fit()
    # Loaded tensors are mapped from their files, one of which is cut short here.
    whole = {name: value.clone() for name, value in state_of(tmp_path).items()}
    (tmp_path / "checkpoints" / "step-00000020" / "ema.safetensors").write_bytes(b"")
    trainer(tmp_path).fit()
    out = capsys.readouterr().out
    assert "skipped a checkpoint that is not whole" in out and "step-00000020" in out
    assert "resumed" in out and "step-00000014" in out
    assert_same(state_of(tmp_path), whole)


def test_changed_settings_are_announced_and_used(tmp_path, capsys):
    trainer(tmp_path, max_steps=5).fit()
    run = trainer(tmp_path, max_steps=6, weight_decay=0.3, betas=(0.5, 0.6))
    run.fit()
    out = capsys.readouterr().out
    assert "note: weight_decay was 0.01 in the checkpoint and is now 0.3" in out
    assert "note: max_steps was 5" in out and "note: lr" not in out
    assert run.optimizer.param_groups[0]["weight_decay"] == 0.3
    assert run.optimizer.param_groups[0]["betas"] == (0.5, 0.6)


def test_another_model_in_the_folder_is_refused(tmp_path):
    trainer(tmp_path, max_steps=5).fit()
    with pytest.raises(CheckpointError, match=r"weight has the shape \(2, 3\), this configuration needs \(2, 4\)"):
        trainer(tmp_path, Linear(width=4)).fit()


@pytest.mark.parametrize("make", [lambda path: path.write_text("a file"), lambda path: path.symlink_to("/proc/none")])
def test_unwritable_run_folder(tmp_path, make):
    make(tmp_path / "run")
    with pytest.raises(DataError, match="cannot write to the run folder .*choose another with --out"):
        trainer(tmp_path / "run" / "vae").fit()


def test_no_space_is_said_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 10})())
    with pytest.raises(DataError, match="free some space"):
        trainer(tmp_path).fit()


def test_compiled_training_is_the_same(tmp_path, monkeypatch):
    """The option reaches the task; what the compiler does with it is not tested here."""
    compiled = []
    monkeypatch.setattr(nn.Module, "compile", lambda self, **options: compiled.append(type(self).__name__))
    trainer(tmp_path, compile=True, max_steps=1).fit()
    assert compiled == ["_Loss"]


def test_deepspeed_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(Accelerator, "distributed_type", DistributedType.DEEPSPEED)
    with pytest.raises(ConfigError, match="DDP or FSDP, found DEEPSPEED in accelerate's configuration"):
        trainer(tmp_path)


def test_what_is_not_trained_in_full_cannot_be_split(tmp_path, monkeypatch):
    monkeypatch.setattr(Accelerator, "distributed_type", DistributedType.FSDP)
    with pytest.raises(ConfigError, match="FSDP splits models that are trained in full"):
        trainer(tmp_path)


def test_no_averages_where_the_decay_is_zero(tmp_path):
    task = Linear()
    trainer(tmp_path, task, ema_decay=0.0).fit()
    assert not any(name.startswith("ema ") for name in state_of(tmp_path))
    assert log_of(tmp_path)[-1]["weight"] == pytest.approx(task.layer.weight.sum().item(), rel=1e-5)


def scaled(folder, **changes):
    """As in fp16 on a GPU, without the fp16."""
    run = trainer(folder, **changes)
    run.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20, growth_interval=4)
    return run


def test_scaled_gradients_train_alike_and_resume_with_their_scale(tmp_path):
    trainer(tmp_path / "plain").fit()
    run = scaled(tmp_path / "whole")
    run.fit()
    assert run.scaler.get_scale() == 2.0**25
    assert_same(state_of(tmp_path / "whole"), state_of(tmp_path / "plain"), rtol=1e-4, atol=1e-6)
    scaled(tmp_path / "parts", decay="constant", max_steps=9).fit()
    run = scaled(tmp_path / "parts", decay="constant")
    run.fit()
    assert run.scaler.get_scale() == 2.0**25
    scaled(tmp_path / "constant", decay="constant").fit()
    assert_same(state_of(tmp_path / "parts"), state_of(tmp_path / "constant"))


def test_some_checkpoints_are_spared(tmp_path):
    task = Linear()
    task.steps_to_keep = lambda: [7]
    trainer(tmp_path, task, keep_checkpoints=1).fit()
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-00000007", "step-00000020"]


@pytest.mark.parametrize("kill_at", ["validate", "preview"])
def test_what_was_cut_off_after_a_checkpoint_is_done_at_the_next_start(tmp_path, monkeypatch, kill_at):
    trainer(tmp_path / "whole", checkpoint_every=10).fit()

    def killed(self, *arguments):
        raise KeyboardInterrupt

    cut = trainer(tmp_path / "parts", checkpoint_every=10)
    monkeypatch.setattr(cut.task, kill_at, killed.__get__(cut.task))
    with pytest.raises(KeyboardInterrupt):
        cut.fit()
    task = Linear()
    trainer(tmp_path / "parts", task, checkpoint_every=10).fit()
    assert task.previews == [10, 20]
    kept = [
        {key: entry[key] for key in entry if key in ("step", "loss", "weight")} for entry in log_of(tmp_path / "parts")
    ]
    assert kept == [
        {key: entry[key] for key in entry if key in ("step", "loss", "weight")} for entry in log_of(tmp_path / "whole")
    ]


def test_a_finished_run_measures_its_last_step_again_alone(tmp_path):
    trainer(tmp_path).fit()
    before = log_of(tmp_path)
    task = Linear()
    trainer(tmp_path, task).fit()
    assert task.previews == [20] and log_of(tmp_path) == before


def test_the_steps_before_the_newest_checkpoint_are_taken_again(tmp_path):
    trainer(tmp_path).fit()
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    run = trainer(tmp_path)
    run.start()
    assert verify_resume(run, 5) == (14, 20)
    assert run.step == 20 and files == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(UsageError, match="a checkpoint at least 7 steps before the newest in .*, found steps 20, 14;"):
        verify_resume(run, 7)


def test_another_result_of_the_same_steps_is_named(tmp_path):
    trainer(tmp_path).fit()
    other = Linear()
    other.batch = lambda step, rows: {name: array * 1.001 for name, array in Linear.batch(other, step, rows).items()}
    run = trainer(tmp_path, other)
    run.start()
    with pytest.raises(CheckpointError, match=r"steps 14 to 20 of .*, taken again, give another bias \(weights\)"):
        verify_resume(run, 1)
    assert_same({"weight": run.parameters["weight"].detach()}, {"weight": state_of(tmp_path)["weight"]})


def test_a_tracker_gets_what_the_log_gets(tmp_path, monkeypatch):
    class Kept:
        place = "here"

        def __init__(self, run, settings):
            self.settings, self.entries = settings, []
            trackers.append(self)

        def write(self, entry):
            self.entries.append(dict(entry))

        def image(self, name, image, step):
            raise ConnectionError("nobody listens")

        def close(self):
            self.entries.append("closed")

    trackers = []
    monkeypatch.setattr("latentdiff.training.journal.WandB", Kept)
    trainer(tmp_path, track="wandb").fit()
    (tracker,) = trackers
    assert [*map(json.loads, (tmp_path / "log.jsonl").read_text().splitlines()), "closed"] == tracker.entries
    assert tracker.settings["lr"] == 0.05 and tracker.settings["max_steps"] == 20
    trainer(tmp_path, track="wandb").fit()  # nothing is left to do, so there is nothing to show
    assert len(trackers) == 1
