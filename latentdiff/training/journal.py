"""What a run writes down about itself."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from latentdiff.errors import DataError, MissingDependencyError
from latentdiff.files import atomic_path
from latentdiff.training.report.tensorboard import TensorBoard


class Journal:
    """`log.jsonl`: one JSON object per line, and the same for TensorBoard where that is installed.

    Lines beyond the resumed step belong to a lost continuation and go.

    Args:
        path: of the file.
        step: the resumed one, or 0.
        enabled: whether this process writes.
        measure_again: what was measured at the resumed step goes too, since it is measured again.
    """

    def __init__(self, path: Path, step: int, *, enabled: bool, measure_again: bool = False) -> None:
        self._path, self._enabled, self._step = path, enabled, step
        self._board: TensorBoard | None = None
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
        if self._wants_board and self._board is None:
            self._board = _tensorboard(self._path.parent, self._step)
            self._wants_board = self._board is not None
        if self._board is not None:
            self._board.write(entry)

    def close(self) -> None:
        """Finish TensorBoard's files."""
        if self._board is not None:
            self._board.close()


def _tensorboard(folder: Path, step: int) -> TensorBoard | None:
    try:
        return TensorBoard(folder, step)
    except MissingDependencyError:
        return None


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
        """Means over the window, and its steps per second; it starts anew."""
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
