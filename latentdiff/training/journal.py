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

from latentdiff.errors import DataError
from latentdiff.files import atomic_path


class Journal:
    """`log.jsonl`: one JSON object per line. Lines beyond the resumed step belong to a lost continuation and go."""

    def __init__(self, path: Path, step: int, *, enabled: bool) -> None:
        self._path, self._enabled = path, enabled
        if enabled and path.is_file():
            lines = [
                line
                for line in path.read_text().splitlines()
                if line.endswith("}") and json.loads(line)["step"] <= step
            ]
            with atomic_path(path) as temporary:
                temporary.write_text("".join(f"{line}\n" for line in lines))

    def write(self, entry: dict[str, float]) -> None:
        if not self._enabled:
            return
        try:
            with open(self._path, "a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
        except OSError as error:
            raise DataError(
                f"cannot write {self._path}: {error.strerror}; free some space, the run goes on from there"
            ) from error


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
