"""`log.jsonl` of a run, read again."""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from latentdiff.errors import DataError
from latentdiff.reading.json import read_object

LOG = "log.jsonl"
RESULT = "result.json"  # the step that the result is from, and why


@dataclass(frozen=True)
class RunLog:
    """`log.jsonl` by name of the measurement: points (step, value) in the order of the steps."""

    values: Mapping[str, list[tuple[int, float]]]

    @classmethod
    def read(cls, path: Path) -> RunLog:
        """Read a log; a last line that was cut off is left out.

        Raises:
            DataError: there is none, or a line is not a JSON object with a step.
        """
        if not path.is_file():
            raise DataError(f"expected the folder of a training run, found no {path.name} in {path.parent}")
        lines = path.read_text(encoding="utf-8").splitlines()
        values: dict[str, list[tuple[int, float]]] = defaultdict(list)
        for place, line in enumerate(lines):
            try:
                entry = json.loads(line)
                step = int(entry.pop("step"))
            except (ValueError, KeyError, AttributeError) as error:
                if place == len(lines) - 1:
                    break
                raise DataError(
                    f"{path} line {place + 1}: expected a JSON object with a step, found {line[:60]!r}"
                ) from error
            for name, value in entry.items():
                if isinstance(value, int | float):
                    values[name].append((step, float(value)))
        return cls({name: sorted(points) for name, points in values.items()})

    def __getitem__(self, name: str) -> list[tuple[int, float]]:
        return self.values.get(name, [])

    def last(self, name: str) -> float | None:
        return self[name][-1][1] if self[name] else None

    def losses(self, part: str) -> list[tuple[int, float]]:
        """The loss at fixed noise on the images held out, "val", or on as many training images, "train"."""
        return self[f"{part}_mse"] or self[f"{part}_dpo"]

    @property
    def held_out_bands(self) -> dict[str, list[tuple[int, float]]]:
        """The held-out loss in each band of timesteps, by name."""
        return {name: points for name, points in self.values.items() if re.fullmatch(r"val_\d+_\d+", name)}

    @property
    def steps(self) -> int:
        return max((points[-1][0] for points in self.values.values()), default=0)

    @cached_property
    def best(self) -> tuple[int, float] | None:
        """Step and value of the smallest validation loss."""
        finite = [point for point in self.losses("val") if math.isfinite(point[1])]
        return min(finite, key=lambda point: (point[1], point[0]), default=None)


# What is said of a share that was kept: at least so much of it, and in words. Shares are of squares, and guidance enlarges
# what is left: at 0.98, the embedded model's cat had lost its face.
_KEPT_IN_WORDS = (
    (0.99, "hardly anything was forgotten"),
    (0.95, "a little was forgotten"),
    (0.8, "much was forgotten"),
    (0.0, "most was forgotten"),
)


def kept_in_words(share: float) -> str:
    """What it means that a model has kept this share, 0 to 1, of what it knew."""
    return next(words for least, words in _KEPT_IN_WORDS if share >= least)


def kept_by_result(run: Path) -> float | None:
    """The share of what the model knew that the result of a run has kept, if that was measured."""
    if not (run / LOG).is_file():
        return None
    points = RunLog.read(run / LOG)["kept"]
    path = run / RESULT
    step = read_object(path, DataError, remedy="delete it").get("step") if path.is_file() else None
    return dict(points).get(step, points[-1][1]) if points else None


def best_step(run: Path) -> int | None:
    """The step with the smallest validation loss so far, if something was held out."""
    best = RunLog.read(run / LOG).best if (run / LOG).is_file() else None
    return best[0] if best else None
