"""Denoising of latents under captions as a task of the training loop, from nothing or of a model that can do it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from latentdiff.training.loss import DenoisingLoss
from latentdiff.training.material import Material
from latentdiff.training.optimizer import ParameterGroup
from latentdiff.training.report.log import best_step
from latentdiff.training.samples import Arrays, Batches, Samples
from latentdiff.training.task import Task
from latentdiff.training.validation import banded_losses, losses_entry


class Stream(Protocol):
    """Batches that are read in sequence."""

    fingerprint: str

    def names(self, step: int) -> list[str]: ...

    def iterate(self, first_step: int, rows: range, micro_batch: int) -> Iterator[Arrays]: ...


class Sheets(Protocol):
    """Draws sample images with the networks as they are."""

    def write(self, step: int, weights: str) -> None: ...


class Knowledge(Protocol):
    """What a model knew before it was trained."""

    def kept(self, module: DenoisingLoss) -> float:
        """The share of it, 0 to 1, that the model as it is still knows."""
        ...


class Practice(Protocol):
    """What a model practises that it knew before."""

    def rows(self, step: int, rows: range) -> Arrays:
        """What goes into the batch with the given rows of a step."""
        ...


class Decides(Protocol):
    """Says when a run is done."""

    def best(self) -> int | None:
        """The best step so far."""
        ...

    def is_done(self) -> bool: ...

    def seen(self) -> dict[str, float]:
        """What is to be logged about the newest samples."""
        ...


class DenoisingTask(Task):
    """Denoising of latents under captions.

    Attributes:
        knowledge: what the model is not to forget, which is measured where it is given.
        practice: what goes into the batches for that.
        decides: says when the run is done and which step is the best; without it, the smallest held-out loss does the
            latter.
        settles: what is done with the weights after each step.

    Args:
        module: the loss.
        groups: gives what is trained; asked again once the networks have been split over processes, which changes their
            parameters for others.
        batches: what each step sees.
        material: images to measure on; without held-out ones nothing is measured.
        sheets: draws samples of the averaged weights, and of the raw ones if `draws_raw`.
        folder: of the stage, where its log lies.
        seed: of the run.
        networks: those all of whose parameters are trained.
        loader_threads: background threads that make batches.
        measures_start: whether the model can do something before the first step.
        resume_hint: what a run that was stopped says to its user.
    """

    def __init__(
        self,
        module: DenoisingLoss,
        groups: Callable[[], list[ParameterGroup]],
        batches: Batches | Stream,
        material: Material,
        sheets: Sheets,
        folder: Path,
        *,
        seed: int,
        networks: Sequence[nn.Module] = (),
        loader_threads: int = 2,
        measures_start: bool = False,
        draws_raw: bool = False,
        resume_hint: str = Task.resume_hint,
    ) -> None:
        self.module, self._groups, self._networks = module, groups, list(networks)
        self._batches, self._material, self._sheets = batches, material, sheets
        self.knowledge: Knowledge | None = None
        self.practice: Practice | None = None
        self.decides: Decides | None = None
        self.settles: Callable[[], None] | None = None
        self._folder, self._seed, self._draws_raw = folder, seed, draws_raw
        self.loader_threads, self.measures_start, self.resume_hint = loader_threads, measures_start, resume_hint
        self.fingerprint = f"{batches.fingerprint}, shuffled by seed {seed}"

    def parameter_groups(self) -> list[ParameterGroup]:
        return self._groups()

    def networks(self) -> list[nn.Module]:
        return self._networks

    def compile(self) -> None:
        self.module.unet.compile()

    def batch(self, step: int, rows: range) -> Arrays:
        assert isinstance(self._batches, Batches)
        return self._batches.arrays(step, rows) | self._besides(step, rows)

    def stream(self, first_step: int, rows: range, micro_batch: int) -> Iterator[Arrays] | None:
        batches = self._batches
        return None if isinstance(batches, Batches) else self._streamed(batches, first_step, rows, micro_batch)

    def _streamed(self, batches: Stream, first_step: int, rows: range, micro_batch: int) -> Iterator[Arrays]:
        places = ((step, first) for step in count(first_step) for first in rows[::micro_batch])
        for arrays, (step, first) in zip(batches.iterate(first_step, rows, micro_batch), places, strict=False):
            yield arrays | self._besides(step, range(first, first + micro_batch))

    def _besides(self, step: int, rows: range) -> Arrays:
        numbers = {} if self.module.dropout is None else {"rows": np.arange(rows.start, rows.stop)}
        return numbers if self.practice is None else numbers | self.practice.rows(step, rows)

    def sources(self, step: int) -> list[str]:
        return self._batches.names(step)

    def validate(self) -> dict[str, float]:
        """What is measured with fixed noise, of held-out images and as many training images; and what was not forgotten."""
        of = self._material
        kept = {} if self.knowledge is None else {"kept": round(self.knowledge.kept(self.module), 4)}
        if not len(of.held_out[1]):
            return kept
        losses, others = [], {}
        for part, images in (("val", of.held_out), ("train", of.training_part)):
            if len(images[1]):
                banded, means = self._banded(*images)
                losses.append(banded)
                others |= {f"{part}_{name}": float(f"{mean:.5g}") for name, mean in means.items()}
        timesteps, held_out, *training = len(self.module.objective.alpha), *losses
        entry = losses_entry(held_out, training[0] if training else None, timesteps, self.module.measure)
        return entry | others | kept

    def preview(self, folder: Path, step: int) -> dict[str, float] | None:
        self._sheets.write(step, "ema")
        return None if self.decides is None else self.decides.seen()

    def preview_live(self, folder: Path, step: int) -> None:
        if self._draws_raw:
            self._sheets.write(step, "raw")

    def steps_to_keep(self) -> Collection[int]:
        best = best_step(self._folder) if self.decides is None else self.decides.best()
        return () if best is None else (best,)

    def after_step(self) -> None:
        if self.settles is not None:
            self.settles()

    def is_done(self) -> bool:
        return self.decides is not None and self.decides.is_done()

    def _banded(self, samples: Samples, indices: np.ndarray) -> tuple[np.ndarray, dict[str, float]]:
        """The loss in bands, see `banded_losses`, and the means of what else is measured."""
        others: dict[str, list[Tensor]] = {}

        def errors_of(images: np.ndarray, noise: np.ndarray, timesteps: np.ndarray) -> Tensor:
            captions = [samples.data.captions[index][0] for index in images]
            arrays = {
                **samples.images(images.tolist(), noise[:, 0]),
                **samples.text(captions, max(map(samples.tokens.chunks, captions))),
                "noise": noise[:, 1],
                "timesteps": timesteps,
            }
            device = self.module.objective.alpha.device
            batch = {name: torch.from_numpy(np.ascontiguousarray(array)).to(device) for name, array in arrays.items()}
            measured = self.module.measured(batch)
            for name, values in measured.items():
                others.setdefault(name, []).append(values)
            return measured[self.module.measure]

        losses = banded_losses(
            indices,
            samples.data.names,
            samples.latent_shape,
            errors_of,
            num_train_timesteps=len(self.module.objective.alpha),
            seed=self._seed,
        )
        del others[self.module.measure]
        return losses, {name: float(torch.cat(values).double().mean()) for name, values in others.items()}


def text_and_unet(
    by_part: dict[str, dict[str, nn.Parameter]], lr: float, text_encoder_lr: float | None
) -> list[ParameterGroup]:
    """One group of parameters, or one each for U-Net and text encoder where their learning rates differ.

    Args:
        by_part: "unet" and "text_encoder" -> parameters by names that are unique over both.
    """
    if text_encoder_lr is None or not by_part.get("text_encoder"):
        return [ParameterGroup("all", {name: p for part in by_part.values() for name, p in part.items()})]
    scales = {"text_encoder": text_encoder_lr / lr}
    return [
        ParameterGroup(part, named, scales.get(part, 1.0), muon=part == "unet")
        for part, named in by_part.items()
        if named
    ]
