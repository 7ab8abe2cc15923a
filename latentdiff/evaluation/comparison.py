"""Two models on the same prompts and seeds: by how much one is right more often, and how sure that is."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from latentdiff.evaluation.prompts import TASKS
from latentdiff.evaluation.protocol import Outcome
from latentdiff.evaluation.report import Scores
from latentdiff.evaluation.statistics import bootstrap_interval


@dataclass(frozen=True)
class Difference:
    """The model's share of right images less the other's, with a 95 % interval over prompts, each paired with itself."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Compared:
    """The reports of two models; `str` gives both tables and their differences.

    Args:
        other: of the model of --compare, with the same prompts and settings.
    """

    report: Scores
    other: Scores

    def differences(self) -> dict[str, Difference]:
        """By task, and their mean under "mean"."""
        own, others = (_shares(scores.result.outcomes) for scores in (self.report, self.other))
        pairs = {task: [share - others[task][n] for n, share in found.items()] for task, found in own.items()}
        return {task: _difference([values]) for task, values in pairs.items()} | {
            "mean": _difference(list(pairs.values()))
        }

    def to_json(self) -> dict[str, Any]:
        found = self.differences()
        differences = {task: {"value": one.value, "low": one.low, "high": one.high} for task, one in found.items()}
        compared = {"model": self.other.model, "model_hash": self.other.model_hash, "differences": differences}
        return self.report.to_json() | {"compared": compared}

    def __str__(self) -> str:
        names = {**TASKS, "mean": "mean of tasks"}
        rows = [
            f"{names[task]:20}{f'{one.value:+.3f} [{one.low:+.3f}, {one.high:+.3f}]':>28}"
            for task, one in self.differences().items()
        ]
        title = f"{_name(self.report)} less {_name(self.other)}, same prompts and seeds, 95 % intervals over prompts"
        return "\n".join([str(self.report), "", str(self.other), "", title, *rows])


def _name(scores: Scores) -> str:
    return scores.model or "a model without a name"


def _shares(outcomes: Sequence[Outcome]) -> dict[str, dict[int, float]]:
    """The share of right images of each prompt, by task."""
    found: dict[str, dict[int, list[bool]]] = {}
    for one in outcomes:
        found.setdefault(one.task, defaultdict(list))[one.number].append(one.correct)
    return {
        task: {number: sum(right) / len(right) for number, right in by_prompt.items()}
        for task, by_prompt in found.items()
    }


def _difference(groups: Sequence[Sequence[float]]) -> Difference:
    value = sum(sum(group) / len(group) for group in groups) / len(groups)
    low, high = bootstrap_interval(groups)
    return Difference(value, min(low, value), max(high, value))  # apart by rounding where all prompts agree
