"""The training loop, the same for every task."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterator, Mapping
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm import tqdm

from latentdiff.errors import ConfigError, NotFiniteError, Stopped
from latentdiff.training.agreement import any_says, check_same_step, from_main
from latentdiff.training.checkpoint import Checkpoint, load_checkpoint, newest_checkpoint, save_checkpoint
from latentdiff.training.ema import make_average
from latentdiff.training.folder import prepare
from latentdiff.training.journal import Journal, Window, peak_memory
from latentdiff.training.microbatches import micro_batch_size, micro_batches
from latentdiff.training.optimizer import (
    clip_gradients,
    group_state,
    learning_rate,
    make_optimizer,
    moments,
    restore_group_state,
    restore_moments,
    set_learning_rate,
)
from latentdiff.training.report.log import LOG
from latentdiff.training.sections import StageSection
from latentdiff.training.sharding import copy_into, is_sharding, own_part, shard, synchronise, whole, wholes
from latentdiff.training.stop_signals import StopSignals
from latentdiff.training.task import Task


class TrainingStopped(Stopped):
    """A signal ended the run after it was saved."""


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
        self.micro_batch = micro_batch_size(settings, accelerator)
        task.module.to(accelerator.device)
        self._split = self._shard() if is_sharding(accelerator) else []
        self._groups, averaged = task.parameter_groups(), task.averaged()
        self.parameters = {name: p for group in self._groups for name, p in group.parameters.items()}
        in_ema = {name: p for group in self._groups if group.name in averaged for name, p in group.parameters.items()}
        self.optimizer = make_optimizer(self._groups, settings)
        self.ema = make_average(in_ema, settings, self.optimizer)
        self.scaler: torch.amp.GradScaler | None = getattr(accelerator, "scaler", None)
        self.step = 0
        self._started = self._done = False
        if settings.compile:
            task.compile()
        alone = self._split or accelerator.num_processes == 1 and accelerator.mixed_precision == "no"
        # accelerate would load the compiler, 60 MB, to see whether this is a compiled module.
        self._wrapped = task.module if alone else accelerator.prepare_model(task.module)

    def fit(self) -> None:
        """Train until `max_steps` steps are done, or the task says that it is.

        Raises:
            TrainingStopped: after a signal; a checkpoint has been written.
            NotFiniteError: the loss is NaN or infinite; the newest checkpoint is from before.
            DataError: an image cannot be read, or the folder cannot be written to.
        """
        self.start()
        settings, main = self.settings, self.accelerator.is_main_process
        # What was due at the resumed step may have been cut off after the checkpoint; done again, it gives the same.
        again = self._measures_now or self._draws_now
        tracked = self._settings() if main and settings.track and self.step < settings.max_steps else None
        log = Journal(self.folder / LOG, self.step, enabled=main, measure_again=again, tracked=tracked)
        bar = tqdm(
            total=settings.max_steps, initial=self.step, desc=self.folder.name, unit="step", smoothing=0.02,
            disable=not main, mininterval=2.0,
        )  # fmt: skip
        with StopSignals() as stop, bar, contextlib.closing(log), contextlib.closing(self._batches()) as batches:
            self._measure(log)
            window = Window()
            while self.step < settings.max_steps and not self._done:
                window.add(self._train_step(batches))
                self.step += 1
                bar.update()
                stopping = self._agree(stop.received)
                saving = stopping or self._due(settings.checkpoint_every)
                if saving or self._due(settings.log_every):
                    self._check_finite(window)
                if stopping or self._due(settings.log_every):
                    entry = self._entry(window)
                    log.write(entry)
                    peak = f"{peak_memory(self.accelerator.device) / 2**30:.3g}G"
                    bar.set_postfix(loss=f"{entry['loss']:.4g}", img_s=f"{entry['images_per_second']:.4g}", peak=peak)
                if saving:
                    self.save()
                if stopping:
                    place = f"step {self.step} of {settings.max_steps}"
                    raise TrainingStopped(f"stopped and saved at {place}; {self.task.resume_hint}")
                with window.paused():
                    self._measure(log)

    def start(self) -> None:
        """Get the folder ready and go on from its newest checkpoint; `fit` does it where it was not done before.

        Raises:
            CheckpointError: what lies there was trained otherwise than the settings say.
            DataError: the folder cannot be written to, or is not the same for all processes.
        """
        if not self._started:
            # Room for a checkpoint: weights, averages, two moments.
            prepare(self.folder, 4 * 4 * sum(p.numel() for p in self.parameters.values()))
            self.resume()
            check_same_step(self.accelerator, self.step, self.folder / "checkpoints")
            self._started = True

    @property
    def _measures_now(self) -> bool:
        return self._due(self.settings.validate_every) if self.step else self.task.measures_start

    def _measure(self, log: Journal) -> None:
        """Validate and draw samples, as far as this step is one at which that is done."""
        if self._measures_now:
            log.write({"step": self.step, **self.validate()})
        if self._draws_now:
            log.write({"step": self.step, **self.preview()})
            log.show(self.step)
        if self._measures_now:
            self._done = from_main(self.accelerator, self.task.is_done)

    @property
    def _draws_now(self) -> bool:
        return self.step > 0 and self._due(self.settings.preview_every)

    def validate(self) -> dict[str, float]:
        """What the task measures with the averaged weights; other processes than the main one get nothing."""
        return self._on_main(self._validate)

    def preview(self) -> dict[str, float]:
        """Draw samples of this step; gives what is to be logged about them."""
        folder, step = self.folder / "previews", self.step
        found = self._on_main(lambda: self.task.preview(folder, step))
        self._on_main(lambda: self.task.preview_live(folder, step), averaged=False)
        return found

    def resume(self) -> None:
        """Go on from the newest whole checkpoint, if there is one, and say so."""
        path, skipped = newest_checkpoint(self.folder / "checkpoints")
        for fault in skipped:
            self.accelerator.print(f"skipped a checkpoint that is not whole: {fault}")
        if path is None:
            return
        checkpoint = load_checkpoint(path)
        self.take(checkpoint, path)
        self.accelerator.print(f"resumed {path}")
        now = self._settings()
        for key, was in checkpoint.state.items():
            if key in now and was != now[key]:
                self.accelerator.print(f"note: {key} was {was!r} in the checkpoint and is now {now[key]!r}")

    def take(self, checkpoint: Checkpoint, path: Path) -> None:
        """Stand where a checkpoint is, which was read from `path`.

        Raises:
            CheckpointError: it holds other weights than this task trains.
        """
        self.take_weights(checkpoint, path)
        restore_moments(self.optimizer, self.parameters, checkpoint.optimizer)
        if "optimizer_groups" in checkpoint.state:
            restore_group_state(self.optimizer, checkpoint.state["optimizer_groups"])
        if self.scaler and "gradient_scale" in checkpoint.state:
            self.scaler.load_state_dict(checkpoint.state["gradient_scale"])
        self.step = checkpoint.step

    def take_weights(self, checkpoint: Checkpoint, path: Path) -> None:
        """As `take`, but the weights and averages alone."""
        copy_into(self.parameters, checkpoint.weights, self.parameters, path)
        copy_into(self.ema.average, checkpoint.ema, self.parameters, path)

    def replay(self, until: int) -> None:
        """Take the steps up to `until` and write nothing."""
        with contextlib.closing(self._batches()) as batches:
            while self.step < until:
                self._train_step(batches)
                self.step += 1

    def trial(self, rows: int) -> None:
        """Compute the loss and the gradients of so many rows of the next batch, as one micro-batch, and change nothing."""
        alone = self.settings.model_copy(update={"accumulation": 1})
        with contextlib.closing(micro_batches(self.task, alone, self.accelerator, self.step, rows)) as batches:
            batch = {name: tensor.to(self.accelerator.device) for name, tensor in next(batches).items()}
        self._wrapped(batch, self.step)["loss"].backward()
        self.optimizer.zero_grad(set_to_none=True)

    def state(self) -> Checkpoint:
        """What a checkpoint of this step holds; of split weights, the main process has all of them."""
        state = self._settings()
        if any(of_groups := group_state(self.optimizer)):
            state["optimizer_groups"] = of_groups
        if self.scaler:
            state["gradient_scale"] = self.scaler.state_dict()
        return Checkpoint(self.step, *self._whole_state(), state)

    def save(self) -> None:
        """Write a checkpoint of this step."""
        state = self.state()
        if self.accelerator.is_main_process:
            spare = self.task.steps_to_keep()
            save_checkpoint(self.folder / "checkpoints", state, keep=self.settings.keep_checkpoints, spare=spare)
        self.accelerator.wait_for_everyone()

    def _whole_state(self) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor], Mapping[str, Tensor]]:
        """Weights, averages and moments; of split ones, the whole is put together for the main process."""
        kept = moments(self.optimizer, self.parameters)
        if not self._split:
            return self.parameters, self.ema.average, kept
        main, of = self.accelerator.is_main_process, self.parameters
        parts = {name: own_part(parameter) for name, parameter in of.items()}
        owners = {key: of[key.rsplit("/", 1)[0]] for key in kept}
        return (
            wholes(parts, of, keep=main), wholes(self.ema.average, of, keep=main), wholes(kept, owners, keep=main)
        )  # fmt: skip

    def _shard(self) -> list[nn.Module]:
        networks, settings = self.task.networks(), self.settings
        if (
            not networks
            or settings.optimizer != "adamw"
            or settings.compile
            or getattr(self.accelerator, "scaler", None)
        ):
            raise ConfigError(
                "FSDP splits models that are trained in full, with optimizer adamw, in float32 or bf16, not compiled;"
                " for everything else take DDP, as in configs/accelerate/ddp.yaml"
            )
        shard(networks, self.accelerator.device)
        self.accelerator.print(f"the model is split over {self.accelerator.num_processes} processes (FSDP)")
        return networks

    def whole(self) -> contextlib.AbstractContextManager[None]:
        """Inside, the main process has all of the weights where they were split; all processes must enter."""
        return whole(self._split, here=self.accelerator.is_main_process)

    def _train_step(self, batches: Iterator[dict[str, Tensor]]) -> dict[str, Tensor]:
        """One optimizer step; returns the detached parts of the loss and the gradient norm, without waiting for the
        device."""
        set_learning_rate(self.optimizer, learning_rate(self.step, self.settings))
        parts: dict[str, Tensor] = {}
        for micro in range(self.settings.accumulation):
            batch = {
                name: tensor.to(self.accelerator.device, non_blocking=True) for name, tensor in next(batches).items()
            }
            is_last = micro == self.settings.accumulation - 1
            synchronise(self._split, is_last)
            with contextlib.nullcontext() if is_last or self._split else self.accelerator.no_sync(self._wrapped):
                with self.accelerator.autocast() if self._split else contextlib.nullcontext():
                    losses = self._wrapped(batch, self.step)
                loss = losses["loss"] / self.settings.accumulation
                (self.scaler.scale(loss) if self.scaler else loss).backward()
            for name, loss in losses.items():
                parts[name] = parts.get(name, 0) + loss.detach() / self.settings.accumulation
        if self.scaler:
            self.scaler.unscale_(self.optimizer)
        for group in self._groups:
            norm = clip_gradients(list(group.parameters.values()), self.settings.grad_clip)
            parts[f"grad_norm_{group.name}" if len(self._groups) > 1 else "grad_norm"] = norm
        if self.scaler:
            self.scaler.step(self.optimizer)  # leaves out a step whose scaled gradients overflow, and then scales less
            self.scaler.update()
        else:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.task.after_step()
        self.ema.update(self.step)
        return parts

    def _batches(self) -> Generator[dict[str, Tensor]]:
        return micro_batches(self.task, self.settings, self.accelerator, self.step, self.micro_batch)

    def _entry(self, window: Window) -> dict[str, float]:
        means, rate = window.close()
        if self.accelerator.num_processes > 1:
            means = self.accelerator.reduce(means, "mean")
        return {
            "step": self.step,
            **{name: float(f"{value.item():.5g}") for name, value in means.items()},
            "lr": learning_rate(self.step - 1, self.settings),
            "images_per_second": round(rate * self.settings.batch_size, 2),
            "peak_memory_mb": round(peak_memory(self.accelerator.device) / 1e6),
        }

    def _check_finite(self, window: Window) -> None:
        # With scaled gradients, overflow is how the right scale is found.
        if (place := window.first_not_finite(("loss",) if self.scaler else ("loss", "grad_norm"))) is None:
            return
        step = self.step - len(window) + place
        files = self.task.sources(step)
        kept, _ = newest_checkpoint(self.folder / "checkpoints")
        raise NotFiniteError(
            f"the loss or the gradient of step {step} is not finite; its batch of {len(files)} begins with"
            f" {', '.join(files[:4])}; {f'{kept} is from before' if kept else 'there is no checkpoint yet'};"
            " try a lower lr, or mixed_precision: no"
        )

    def _settings(self) -> dict[str, object]:
        return {"data": self.task.fingerprint, **self.settings.model_dump(mode="json")}

    def _due(self, every: int) -> bool:
        """Whether something happens at this step that happens every so many, and at the last one."""
        return self.step % every == 0 or self.step == self.settings.max_steps

    def _agree(self, received: bool) -> bool:
        """Whether any process got a signal; several processes ask one another only when they log."""
        if self.accelerator.num_processes == 1:
            return received
        return self._due(self.settings.log_every) and any_says(self.accelerator, received)

    def _on_main(self, action: Callable[[], dict[str, float] | None], *, averaged: bool = True) -> dict[str, float]:
        """Run something with the averaged weights in place, on the main process while the others wait."""
        result = {}
        with self.ema.swapped_in() if averaged and self._split else contextlib.nullcontext(), self.whole():
            if self.accelerator.is_main_process:
                swapped = self.ema.swapped_in() if averaged and not self._split else contextlib.nullcontext()
                with swapped, torch.inference_mode():
                    result = action() or {}
        self.accelerator.wait_for_everyone()
        return result

    def _validate(self) -> dict[str, float]:
        with self.accelerator.autocast():
            return self.task.validate()
