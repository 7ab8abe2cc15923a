"""The trial of a fine-tuning from which its `Forecast` comes."""

from __future__ import annotations

import math
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from latentdiff.errors import UsageError
from latentdiff.model.memory.estimate import available_memory
from latentdiff.training.checkpoint import newest_checkpoint
from latentdiff.training.finetuning.config import FinetuneConfig
from latentdiff.training.finetuning.finishing import COPY_CANDIDATES, finish
from latentdiff.training.finetuning.forecast import Forecast, remedies, times_due
from latentdiff.training.finetuning.preparation import Preparation, make_accelerator
from latentdiff.training.loop import Trainer
from latentdiff.training.material import Material
from latentdiff.training.optimizer import moments
from latentdiff.training.peak import PeakMemory, used_memory
from latentdiff.training.report.log import LOG
from latentdiff.training.validation import fixed_part

# Steps are taken until their time is known well enough, and no longer.
_SECONDS_OF_STEPS = 8.0
_FEWEST_STEPS, _MOST_STEPS = 3, 30

_BATCHES_OF_IMAGES = 4  # that the trial encodes
_OF_TRAINING = ("averages", "gradients", "optimizer")  # a LoRA's are next to nothing


def dry_run(settings: FinetuneConfig) -> Forecast:
    """Try a run out, without a trace in its folder.

    Raises:
        UsageError: several processes were started.
        ConfigError, DataError, NotFiniteError: as the run itself would.
    """
    with tempfile.TemporaryDirectory(prefix="latentdiff-dry-run-") as scratch:
        # Named as the run, since its name stands in the files.
        own = settings.model_copy(update={"out": Path(scratch) / settings.out.resolve().name, "cache": None})
        accelerator, own = make_accelerator(own)
        if (processes := accelerator.num_processes) > 1:
            rows = settings.batch_size // processes
            raise UsageError(
                f"expected one process for --dry-run, found {processes}; what each of them will take says one that is started"
                f" without accelerate launch or torchrun, with --batch-size {rows}; with FSDP, divide the weights, averages,"
                f" gradients and optimizer that it names by {processes}"
            )
        own.out.mkdir()
        return _Trial(own, settings.out, accelerator).forecast()


class _Trial:
    """One trial.

    Args:
        settings: those of the run, but for its folder.
        out: the run's own folder, which is only read.
    """

    def __init__(self, settings: FinetuneConfig, out: Path, accelerator: Accelerator) -> None:
        self._settings, self._out, self._accelerator = settings, out, accelerator
        self._device = accelerator.device
        self._seconds: dict[str, float] = {}
        self._program = used_memory(self._device)
        self._peak = PeakMemory(self._device)
        free = available_memory(self._device)
        self._limit = None if free is None else free + self._program

    def forecast(self) -> Forecast:
        with self._timed("start"):
            made = Preparation(self._settings, self._accelerator)
            made.read_data()
        images = _images(made.material)
        passes = self._steps_left * self._settings.batch_size / max(1, len(made.material.training))
        if not made.shards:
            made.material = _part(made.material, _BATCHES_OF_IMAGES * self._settings.batch_size, self._settings.seed)
        tried = _images(made.material)
        with made.computing():
            with self._timed("caches"):
                made.build_caches()
            with ExitStack() as stack:
                with self._timed("start"):
                    trainer = stack.enter_context(made.trainer())
                    trainer.start()
                fixed, per_row = self._of_rows(trainer)
                rows = trainer.micro_batch
                if self._limit is None or fixed + rows * per_row <= self._limit:
                    self._take_steps(trainer)
                    self._finish(trainer, made)
                    found = self._found(trainer, made, images, tried)
                    if found.fits_memory:
                        return replace(found, passes=passes)
                else:
                    self._seconds.clear()
                    found = self._found(trainer, made, images, tried, fixed + rows * per_row)
                return replace(found, passes=passes, remedies=self._remedies(trainer, made, fixed, per_row))

    @property
    def _steps_left(self) -> int:
        return self._settings.max_steps - self._first

    @property
    def _first(self) -> int:
        newest, _ = newest_checkpoint(self._out / "checkpoints")
        return min(int(newest.name.removeprefix("step-")), self._settings.max_steps) if newest else 0

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        before = time.perf_counter()
        yield
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - before

    def _of_rows(self, trainer: Trainer) -> tuple[int, int]:
        """Bytes at the most with no row, and those of each row, of a micro-batch and the step after it."""
        peaks, more = [], min(5, trainer.micro_batch)  # so many that old places have their share, see `Practice`
        for rows in (1, more):
            self._peak.begin()
            trainer.trial(rows)
            peaks.append(self._peak.stretch)
        per_row = max(0, peaks[1] - peaks[0]) // max(1, more - 1)
        # The moments are made after the first gradients, beside which the activations are gone.
        return peaks[0] - per_row + 2 * sum(p.numel() * 4 for p in trainer.parameters.values()), per_row

    def _take_steps(self, trainer: Trainer) -> None:
        """Take steps, and do once what happens between them."""
        last = self._settings.max_steps
        with self._timed("first step"):
            trainer.replay(1)
        count = math.ceil(_SECONDS_OF_STEPS / max(1e-3, self._seconds["first step"]))
        count = min(max(count, _FEWEST_STEPS), _MOST_STEPS, last - 1)
        with self._timed("steps"):
            trainer.replay(1 + count)
        self._seconds["steps"] = self._seconds["steps"] / count if count else self._seconds["first step"]
        for name, act in self._between(trainer).items():
            with self._timed(name):
                act()
        trainer.replay(min(last, trainer.step + 1))  # with what they left in memory

    def _between(self, trainer: Trainer) -> dict[str, Callable[[], object]]:
        return {"measuring": trainer.validate, "samples": trainer.preview, "checkpoints": trainer.save}

    def _finish(self, trainer: Trainer, made: Preparation) -> None:
        (trainer.folder / LOG).write_text('{"step": 1, "loss": 1.0}\n', encoding="utf-8")
        settings = made.settings.model_copy(update={"result": "last", "stop": "last"})
        with self._timed("result and report"):
            finish(settings, trainer, made.method, made.material, made.sheets.written)

    def _found(self, trainer: Trainer, made: Preparation, images: int, tried: int, peak: int | None = None) -> Forecast:
        """What was measured, multiplied out.

        Args:
            images: of the run that are encoded.
            tried: of the trial.
            peak: where the run was not tried, what it would take.
        """
        share = images / max(1, tried)
        cached = _bytes_below(self._settings.out / "cache")
        if self._seconds:
            self._multiply(share, images, tried)
        memory = self._memory(trainer, made, peak or self._peak.overall, cached if self._device.type == "cpu" else 0)
        if memory.get("caches"):
            memory["caches"] = round(memory["caches"] * share)
        place = next(folder for folder in (self._out.absolute(), *self._out.absolute().parents) if folder.is_dir())
        checkpoint = _bytes_below(self._settings.out / "checkpoints") or _checkpoint_bytes(trainer)
        return Forecast(
            steps=self._steps_left,
            passes=0.0,
            seconds=dict(self._seconds),
            memory=memory,
            free_memory=self._limit,
            disk=self._disk(made, checkpoint, round(cached * share)),
            free_disk=shutil.disk_usage(place).free,
            passing_disk=checkpoint,
        )

    def _multiply(self, share: float, images: int, tried: int) -> None:
        settings, seconds, first = self._settings, self._seconds, self._first
        warm_up = seconds.pop("first step") - seconds["steps"]
        seconds["start"] += max(0.0, warm_up)
        seconds["caches"] *= share
        seconds["steps"] *= self._steps_left
        due = {name: times_due(every, first, settings.max_steps) for name, every in self._every.items()}
        due["measuring"] += 1  # before the first step
        for name, times in due.items():
            seconds[name] *= times
        # The samples are compared with the images, which are read again for that.
        more = min(images, COPY_CANDIDATES) - tried
        seconds["result and report"] += seconds["start"] * max(0, more) / max(1, images) if seconds["samples"] else 0.0

    @property
    def _every(self) -> dict[str, int]:
        settings = self._settings
        return {
            "measuring": settings.validate_every,
            "samples": settings.preview_every,
            "checkpoints": settings.checkpoint_every,
        }

    def _memory(self, trainer: Trainer, made: Preparation, peak: int, cached: int) -> dict[str, int]:
        """The peak by what it is made of."""
        parts = made.method.parts
        modules = (parts.unet, parts.text_encoder, parts.vae, made.method.adapter, made.method.control)
        held = moments(trainer.optimizer, trainer.parameters).values()
        trained = trainer.parameters.values()
        known = {
            "program": self._program,
            "weights": _bytes(_tensors(modules)),
            "averages": _bytes(trainer.ema.average.values()),
            "gradients": _bytes(trained),
            "optimizer": _bytes(held) if held else 2 * _bytes(trained),
            "caches": cached,
        }
        return known | {"activations and the rest": max(0, peak - sum(known.values()))}

    def _disk(self, made: Preparation, checkpoint: int, cached: int) -> dict[str, int]:
        settings, out = self._settings, self._settings.out
        written = times_due(settings.checkpoint_every, self._first, settings.max_steps)
        kept = min(written, settings.keep_checkpoints)
        kept += bool(len(made.material.held_out[1])) and written > kept  # the best one
        sheets = times_due(settings.preview_every, self._first, settings.max_steps)
        samples = _bytes_below(out / "samples")
        others = _bytes_below(out) - samples - _bytes_below(out / "checkpoints") - _bytes_below(out / "cache")
        return {
            "checkpoints": kept * checkpoint,
            "caches": cached,
            "samples": sheets * samples,
            "result and report": others,
        }

    def _remedies(self, trainer: Trainer, made: Preparation, fixed: int, per_row: int) -> tuple[str, ...]:
        """Flags with which the run would fit; what gradient checkpointing saves is measured."""
        assert self._limit is not None
        settings, others = self._settings, {}
        if not settings.gradient_checkpointing and not settings.compile:
            for network in (made.method.parts.unet, made.method.control):
                if network is not None:
                    network.enable_gradient_checkpointing()
            others["--gradient-checkpointing"] = self._of_rows(trainer)
        memory = self._memory(trainer, made, 0, 0)
        if settings.method == "full":
            others["--method lora"] = fixed - sum(memory[name] for name in _OF_TRAINING), per_row
        elif settings.base_precision == "fp32":
            others["--base-precision bf16"] = fixed - memory["weights"] // 2, per_row
        side = settings.resolution or made.method.parts.unet.config.sample_size * made.method.parts.vae.config.downscale
        others[f"--resolution {side // 2}"] = fixed, per_row // 4
        return remedies(fixed, per_row, trainer.micro_batch, settings.accumulation, self._limit, others)


def _part(of: Material, count: int, seed: int) -> Material:
    """The same with so many training images, beside those on which is measured."""
    names = of.samples.data.names
    few = fixed_part([names[index] for index in of.training], range(len(of.training)), count, seed)
    return replace(of, training=np.union1d(of.training[few], of.training_part[1]))


def _images(of: Material) -> int:
    return sum(len(indices) for _, indices in of.of())


def _tensors(modules: Iterable[nn.Module | None]) -> Iterator[Tensor]:
    found = {id(t): t for module in modules if module for t in (*module.parameters(), *module.buffers())}
    yield from found.values()


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _checkpoint_bytes(trainer: Trainer) -> int:
    held = moments(trainer.optimizer, trainer.parameters)
    trained = trainer.parameters.values()
    return _bytes(trained) + _bytes(trainer.ema.average.values()) + (_bytes(held.values()) or 2 * _bytes(trained))


def _bytes_below(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
