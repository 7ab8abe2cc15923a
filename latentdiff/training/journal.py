"""What a run writes down about itself, and for whom."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Protocol

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from latentdiff.errors import DataError, MissingDependencyError
from latentdiff.files import atomic_path
from latentdiff.training.report.tensorboard import TensorBoard
from latentdiff.training.report.wandb_run import WandB


class Tracker(Protocol):
    """A program that shows the log and the samples of a run."""

    def write(self, entry: Mapping[str, float]) -> None:
        """Take in one entry of `log.jsonl`."""
        ...

    def image(self, name: str, image: Image.Image, step: int) -> None:
        """Take in a sample sheet."""
        ...

    def close(self) -> None: ...


class Journal:
    """`log.jsonl`: one JSON object per line, and the same for TensorBoard where that is installed.

    What trackers do wrong never ends a training: one that fails is told and left out from then on.

    Lines beyond the resumed step belong to a lost continuation and go.

    Args:
        path: of the file.
        step: the resumed one, or 0.
        enabled: whether this process writes.
        measure_again: what was measured at the resumed step goes too, since it is measured again.
        tracked: the configuration, where Weights & Biases gets everything too.
    """

    def __init__(
        self,
        path: Path,
        step: int,
        *,
        enabled: bool,
        measure_again: bool = False,
        tracked: Mapping[str, object] | None = None,
    ) -> None:
        self._path, self._enabled, self._step = path, enabled, step
        self._trackers: list[Tracker] = []
        if tracked is not None:
            self._trackers.append(tracker := WandB(path.parent, tracked))
            tqdm.write(f"Weights & Biases: {tracker.place}")
        self._wants_board = enabled
        if enabled and path.is_file():
            whole = [(line, json.loads(line)) for line in path.read_text().splitlines() if line.endswith("}")]
            lines = [
                line
                for line, entry in whole
                if entry["step"] < step or entry["step"] == step and not (measure_again and "loss" not in entry)
            ]
            with atomic_path(path) as temporary:
                temporary.write_text("".join(f"{line}\n" for line in lines))

    def write(self, entry: dict[str, float]) -> None:
        """Add an entry with its step; one that says nothing else is left out."""
        if not self._enabled or len(entry) < 2:
            return
        try:
            with open(self._path, "a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
        except OSError as error:
            raise DataError(
                f"cannot write {self._path}: {error.strerror}; free some space, the run goes on from there"
            ) from error
        if self._wants_board:
            self._wants_board = False
            with contextlib.suppress(MissingDependencyError):
                self._trackers.append(TensorBoard(self._path.parent, self._step))
        self._tell(lambda tracker: tracker.write(entry))

    def show(self, step: int) -> None:
        """Give the sample sheets of a step to the trackers."""
        if not self._trackers:
            return
        for path in sorted(self._path.parent.glob(f"samples/step-{step:08d}/*/sheet.png")):
            with Image.open(path) as sheet:
                sheet.load()
            self._tell(lambda tracker, name=path.parent.name, image=sheet: tracker.image(name, image, step))

    def close(self) -> None:
        """Finish what the trackers write."""
        self._tell(lambda tracker: tracker.close())

    def _tell(self, what: Callable[[Tracker], None]) -> None:
        for tracker in list(self._trackers):
            try:
                what(tracker)
            except Exception as error:  # of a library, its service, or the network: anything
                self._trackers.remove(tracker)
                tqdm.write(
                    f"note: {type(tracker).__name__} fails and gets no more of this run: {error}", file=sys.stderr
                )


def peak_memory(device: torch.device) -> int:
    """The most memory in bytes that this process has used, on the GPU if it computes there."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024


class Window:
    """Losses since the last log entry, kept on the device: reading them waits for it, so that happens once per
    entry."""

    def __init__(self) -> None:
        self._steps: list[dict[str, Tensor]] = []
        self._started = time.perf_counter()
        self._pauses = 0.0

    def __len__(self) -> int:
        return len(self._steps)

    def add(self, parts: dict[str, Tensor]) -> None:
        """Take in the loss of a step, its parts, and gradient norms; all scalars, the same names at every step or new
        ones."""
        self._steps.append(parts)

    def first_not_finite(self, watched: tuple[str, ...] = ("loss", "grad_norm")) -> int | None:
        """Number, within the window, of the first step with a NaN or an infinity in what begins with `watched`."""
        if not self._steps:
            return None
        values = [[value for name, value in parts.items() if name.startswith(watched)] for parts in self._steps]
        finite = torch.stack([sum(of_step) for of_step in values]).isfinite().tolist()
        return None if all(finite) else finite.index(False)

    def close(self) -> tuple[dict[str, Tensor], float]:
        """Means over the window, and its steps per second; it starts over."""
        # A part may begin to exist within the window (adversarial terms); its mean is over the steps that have it.
        means = {
            name: torch.stack([parts[name].float() for parts in self._steps if name in parts]).mean()
            for name in self._steps[-1]
        }
        rate = len(self._steps) / (time.perf_counter() - self._started - self._pauses)
        self._steps, self._started, self._pauses = [], time.perf_counter(), 0.0
        return means, rate

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time inside does not count as training."""
        before = time.perf_counter()
        yield
        self._pauses += time.perf_counter() - before
