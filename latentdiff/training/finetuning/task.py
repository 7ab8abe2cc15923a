"""Fine-tuning as a task of the training loop."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from latentdiff.errors import MissingDependencyError
from latentdiff.training.finetuning.loss import FinetuneLoss
from latentdiff.training.finetuning.methods import Method
from latentdiff.training.finetuning.report import best_step
from latentdiff.training.finetuning.samples import Batches, Samples
from latentdiff.training.finetuning.sheets import SampleSheets
from latentdiff.training.finetuning.streaming import StreamBatches
from latentdiff.training.finetuning.tensorboard import TensorBoard
from latentdiff.training.finetuning.validation import banded_losses, losses_entry
from latentdiff.training.optimizer import ParameterGroup
from latentdiff.training.task import Task


class FinetuneTask(Task):
    """Denoising of latents under captions, of a model that can do it already.

    Args:
        module: the loss.
        method: what is trained.
        batches: what each step sees.
        held_out, training_part: images to measure on, as (samples, indices); empty indices measure nothing.
        sheets: writes sample pictures.
        out: the run folder.
        seed: of the run.
    """

    measures_start = True

    def __init__(
        self,
        module: FinetuneLoss,
        method: Method,
        batches: Batches | StreamBatches,
        held_out: tuple[Samples, np.ndarray],
        training_part: tuple[Samples, np.ndarray],
        sheets: SampleSheets,
        out: Path,
        *,
        loader_threads: int,
        seed: int,
    ) -> None:
        self.module, self.loader_threads = module, loader_threads
        self.fingerprint = f"{batches.fingerprint}, shuffled by seed {seed}"
        self.resume_hint = f"go on with: latentdiff finetune --resume {out}"
        self._board: TensorBoard | None = None
        self._method, self._batches, self._sheets, self._seed = method, batches, sheets, seed
        self._held_out, self._training_part = held_out, training_part
        self._out, self._wants_board = out, True

    def parameter_groups(self) -> list[ParameterGroup]:
        return self._method.parameter_groups()

    def networks(self) -> list[nn.Module]:
        return self._method.networks()

    def compile(self) -> None:
        self.module.unet.compile()

    def batch(self, step: int, rows: range) -> dict[str, np.ndarray]:
        assert isinstance(self._batches, Batches)
        return self._batches.arrays(step, rows)

    def stream(self, first_step: int, rows: range, micro_batch: int) -> Iterator[dict[str, np.ndarray]] | None:
        batches = self._batches
        return batches.iterate(first_step, rows, micro_batch) if isinstance(batches, StreamBatches) else None

    def sources(self, step: int) -> list[str]:
        return self._batches.names(step)

    def validate(self) -> dict[str, float]:
        """Losses with fixed noise, of held-out images and as many training images."""
        if not len(self._held_out[1]):
            return {}
        timesteps = len(self.module.objective.alpha)
        measured = [self._banded(*part) for part in (self._held_out, self._training_part) if len(part[1])]
        return losses_entry(measured[0], measured[1] if len(measured) > 1 else None, timesteps)

    def preview(self, folder: Path, step: int) -> None:
        self._sheets.write(step, "ema")

    def preview_live(self, folder: Path, step: int) -> None:
        self._sheets.write(step, "raw")

    @property
    def sample_files(self) -> list[Path]:
        """The newest sample pictures of the averaged weights."""
        return self._sheets.written

    def steps_to_keep(self) -> list[int]:
        return [best] if (best := best_step(self._out)) is not None else []

    def logged(self, entry: Mapping[str, float]) -> None:
        if self._board is None and self._wants_board:
            self._board = _tensorboard(self._out, int(entry["step"]))
            self._wants_board = self._board is not None
        if self._board is not None:
            self._board.write(entry)

    def close(self) -> None:
        """Finish what is written on the side."""
        if self._board is not None:
            self._board.close()

    def _banded(self, samples: Samples, indices: np.ndarray) -> np.ndarray:
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
            module = self.module
            return module.errors(module.latents(batch), batch["noise"], batch["timesteps"], module.context(batch))

        return banded_losses(
            indices,
            samples.data.names,
            samples.latent_shape,
            errors_of,
            num_train_timesteps=len(self.module.objective.alpha),
            seed=self._seed,
        )


def _tensorboard(out: Path, step: int) -> TensorBoard | None:
    """TensorBoard's files, where it is installed; the log says the same without it."""
    try:
        return TensorBoard(out, step - 1)
    except MissingDependencyError:
        return None
