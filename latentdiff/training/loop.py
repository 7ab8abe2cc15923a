"""The training loop, the same for every task."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from latentdiff.errors import CheckpointError, ConfigError, DataError, LatentDiffError, NotFiniteError
from latentdiff.files import atomic_path
from latentdiff.training.checkpoint import Checkpoint, check_space, load_checkpoint, newest_checkpoint, save_checkpoint
from latentdiff.training.config import StageSection
from latentdiff.training.data import Prefetch
from latentdiff.training.ema import EMA
from latentdiff.training.optimizer import learning_rate, make_optimizer, set_learning_rate
from latentdiff.training.task import Task


class TrainingStopped(LatentDiffError):
    """A signal ended the run after it was saved."""

    exit_code = 130


class Trainer:
    """Trains one task in one folder, going on from the newest whole checkpoint there.

    Args:
        task: what is trained.
        settings: how.
        folder: `log.jsonl`, `checkpoints/` and `previews/` lie in it.
        accelerator: device, precision and processes.
    """

    def __init__(self, task: Task, settings: StageSection, folder: Path, accelerator: Accelerator) -> None:
        self.task, self.settings, self.folder, self.accelerator = task, settings, folder, accelerator
        splits = accelerator.num_processes * settings.accumulation
        if settings.batch_size % splits:
            raise ConfigError(
                f"batch_size {settings.batch_size} must be divisible by processes x accumulation ="
                f" {accelerator.num_processes} x {settings.accumulation}"
            )
        self._micro_batch = settings.batch_size // splits
        task.module.to(accelerator.device)
        self._groups = task.parameter_groups()
        self.parameters = {name: p for group in self._groups for name, p in group.parameters.items()}
        averaged = task.averaged()
        self.ema = EMA(
            {name: p for group in self._groups if group.name in averaged for name, p in group.parameters.items()},
            settings.ema_decay,
            settings.ema_every,
        )
        self.optimizer = make_optimizer(self._groups, settings)
        self.step = 0
        if settings.compile:
            task.compile()
        self._wrapped = accelerator.prepare_model(task.module)

    def fit(self) -> None:
        """Train until `max_steps` steps are done.

        Raises:
            TrainingStopped: after a signal; a checkpoint has been written.
            NotFiniteError: the loss is NaN or infinite; the newest checkpoint is from before.
            DataError: an image cannot be read, or the folder cannot be written to.
        """
        self._prepare_folder()
        self.resume()
        log = _Log(self.folder / "log.jsonl", self.step, enabled=self.accelerator.is_main_process)
        bar = tqdm(
            total=self.settings.max_steps, initial=self.step, desc=self.folder.name, unit="step", smoothing=0.02,
            disable=not self.accelerator.is_main_process, mininterval=2.0,
        )  # fmt: skip
        saved = self.step
        with _StopSignals() as stop, bar, contextlib.closing(self._batches()) as batches:
            window = _Window(self)
            while self.step < self.settings.max_steps:
                window.add(self._train_step(batches))
                self.step += 1
                bar.update()
                last = self.step == self.settings.max_steps
                stopping = self._agree(stop.received) if self._due(self.settings.log_every) or stop.received else False
                if last or stopping or self._due(self.settings.log_every):
                    entry = window.close()
                    log.write(entry)
                    bar.set_postfix(loss=f"{entry['loss']:.4g}", img_s=f"{entry['images_per_second']:.4g}")
                if last or stopping or self._due(self.settings.checkpoint_every):
                    window.check_finite()
                    self.save()
                    saved = self.step
                if stopping:
                    raise TrainingStopped(
                        f"stopped at step {saved} of {self.settings.max_steps} and saved; the same command goes on from there"
                    )
                with window.paused():
                    if last or self._due(self.settings.validate_every):
                        log.write({"step": self.step, **self._on_main(self._validate)})
                    if last or self._due(self.settings.preview_every):
                        self._on_main(lambda: self.task.preview(self.folder / "previews", self.step))

    def resume(self) -> None:
        """Go on from the newest whole checkpoint, if there is one, and say so."""
        path, skipped = newest_checkpoint(self.folder / "checkpoints")
        for fault in skipped:
            self.accelerator.print(f"skipped a checkpoint that is not whole: {fault}")
        if path is None:
            return
        checkpoint = load_checkpoint(path)
        _copy_into(self.parameters, checkpoint.weights, path)
        _copy_into(self.ema.average, checkpoint.ema, path)
        self.optimizer.load_state_dict(dict(checkpoint.optimizer))
        self.step = checkpoint.step
        self.accelerator.print(f"resumed {path}")
        now = self._state()
        for key, was in checkpoint.state.items():
            if key in now and was != now[key]:
                self.accelerator.print(f"note: {key} was {was!r} in the checkpoint and is now {now[key]!r}")

    def save(self) -> None:
        """Write a checkpoint of this step."""
        if self.accelerator.is_main_process:
            checkpoint = Checkpoint(self.step, self.parameters, self.ema.average, self.optimizer.state_dict(), self._state())
            save_checkpoint(self.folder / "checkpoints", checkpoint, keep=self.settings.keep_checkpoints)
        self.accelerator.wait_for_everyone()

    def _train_step(self, batches: Iterator[dict[str, Tensor]]) -> dict[str, Tensor]:
        """One optimizer step; returns the detached parts of the loss and the gradient norm, without waiting for the device."""
        set_learning_rate(self.optimizer, learning_rate(self.step, self.settings))
        parts: dict[str, Tensor] = {}
        for micro in range(self.settings.accumulation):
            batch = {name: tensor.to(self.accelerator.device, non_blocking=True) for name, tensor in next(batches).items()}
            is_last = micro == self.settings.accumulation - 1
            with contextlib.nullcontext() if is_last else self.accelerator.no_sync(self._wrapped):
                losses = self._wrapped(batch, self.step)
                (losses["loss"] / self.settings.accumulation).backward()
            for name, loss in losses.items():
                parts[name] = parts.get(name, 0) + loss.detach() / self.settings.accumulation
        for group in self._groups:
            norm = torch.nn.utils.clip_grad_norm_(group.parameters.values(), self.settings.grad_clip)
            parts[f"grad_norm_{group.name}" if len(self._groups) > 1 else "grad_norm"] = norm
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.update(self.step)
        return parts

    def _batches(self) -> Iterator[dict[str, Tensor]]:
        """Micro-batches of this process, from the current step on."""
        settings, device = self.settings, self.accelerator.device

        def make(key: tuple[int, int]) -> dict[str, Tensor]:
            step, first = key
            arrays = self.task.batch(step, range(first, first + self._micro_batch))
            batch = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}
            return {name: tensor.pin_memory() for name, tensor in batch.items()} if device.type == "cuda" else batch

        own = self.accelerator.process_index * settings.accumulation
        keys = (
            (step, (own + micro) * self._micro_batch)
            for step in range(self.step, settings.max_steps)
            for micro in range(settings.accumulation)
        )
        return iter(Prefetch(make, keys))

    def _state(self) -> dict[str, object]:
        return {"data": self.task.fingerprint, **self.settings.model_dump(mode="json")}

    def _due(self, every: int) -> bool:
        return self.step % every == 0

    def _agree(self, received: bool) -> bool:
        """Whether any process got a signal."""
        if self.accelerator.num_processes == 1:
            return received
        flag = torch.tensor([float(received)], device=self.accelerator.device)
        return bool(self.accelerator.reduce(flag, "sum").item())

    def _on_main(self, action):
        """Run something with the averaged weights in place, on the main process while the others wait."""
        result = {}
        if self.accelerator.is_main_process:
            with self.ema.swapped_in(), torch.inference_mode():
                result = action()
        self.accelerator.wait_for_everyone()
        return result

    def _validate(self) -> dict[str, float]:
        with self.accelerator.autocast():
            return self.task.validate()

    def _prepare_folder(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not os.access(self.folder, os.W_OK):
                raise PermissionError(None, "Permission denied")
        except OSError as error:
            raise DataError(f"cannot write to the run folder {self.folder}: {error.strerror}; choose another `run`") from error
        check_space(self.folder, 4 * 4 * sum(p.numel() for p in self.parameters.values()))


class _Window:
    """Losses since the last log entry, kept on the device: reading them waits for it, so that happens once per entry."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._parts: list[dict[str, Tensor]] = []
        self._started = time.perf_counter()
        self._pauses = 0.0

    def add(self, parts: dict[str, Tensor]) -> None:
        self._parts.append(parts)

    def check_finite(self) -> None:
        """Raise NotFiniteError with the first step whose loss is NaN or infinite."""
        if not self._parts:
            return
        losses = torch.stack([parts["loss"] for parts in self._parts]).isfinite().tolist()
        if all(losses):
            return
        step = self._trainer.step - len(losses) + losses.index(False)
        files = self._trainer.task.sources(step)
        kept, _ = newest_checkpoint(self._trainer.folder / "checkpoints")
        raise NotFiniteError(
            f"the loss of step {step} is not finite; its batch: {', '.join(files[:4])}{', ...' if len(files) > 4 else ''};"
            f" {f'the checkpoint {kept} is from before' if kept else 'there is no checkpoint yet'};"
            " try a lower lr or mixed_precision: no"
        )

    def close(self) -> dict[str, float]:
        """The log entry of the window, which starts anew."""
        self.check_finite()
        trainer, steps = self._trainer, len(self._parts)
        names = list(self._parts[-1])
        # A part may begin to exist within the window (adversarial terms); it is averaged over the steps that have it.
        means = {name: torch.stack([parts[name].float() for parts in self._parts if name in parts]).mean() for name in names}
        if trainer.accelerator.num_processes > 1:
            means = trainer.accelerator.reduce(means, "mean")
        seconds = time.perf_counter() - self._started - self._pauses
        self._parts, self._started, self._pauses = [], time.perf_counter(), 0.0
        return {
            "step": trainer.step,
            **{name: float(f"{value.item():.5g}") for name, value in means.items()},
            "lr": learning_rate(trainer.step - 1, trainer.settings),
            "images_per_second": round(steps * trainer.settings.batch_size / seconds, 2),
        }

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time inside does not count as training."""
        before = time.perf_counter()
        yield
        self._pauses += time.perf_counter() - before


class _Log:
    """`log.jsonl`: one JSON object per line. Lines beyond the resumed step belong to a lost continuation and go."""

    def __init__(self, path: Path, step: int, *, enabled: bool) -> None:
        self._path, self._enabled = path, enabled
        if enabled and path.is_file():
            lines = [line for line in path.read_text().splitlines() if line.endswith("}") and json.loads(line)["step"] <= step]
            with atomic_path(path) as temporary:
                temporary.write_text("".join(f"{line}\n" for line in lines))

    def write(self, entry: dict[str, float]) -> None:
        if self._enabled:
            with open(self._path, "a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")


class _StopSignals:
    """Takes note of Ctrl-C and SIGTERM instead of dying; a second one is obeyed at once."""

    def __init__(self) -> None:
        self.received = False
        self._before: dict[int, object] = {}

    def __enter__(self) -> _StopSignals:
        # Handlers can be set from the main thread only; elsewhere the program around us deals with signals.
        with contextlib.suppress(ValueError):
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: object) -> None:
        self.received = True
        signal.signal(number, self._before[number])


def _copy_into(live: dict[str, Tensor], saved, path: Path) -> None:
    if differing := sorted(set(live) ^ set(saved)):
        raise CheckpointError(
            f"{path} holds other weights than this configuration trains, first {differing[0]}; choose another `run`"
        )
    with torch.no_grad():
        for name, tensor in live.items():
            if tensor.shape != saved[name].shape:
                raise CheckpointError(
                    f"{path}: {name} has the shape {tuple(saved[name].shape)}, this configuration needs {tuple(tensor.shape)};"
                    " choose another `run`"
                )
            tensor.copy_(saved[name])
