"""Scores as a table for people and as JSON for programs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from latentdiff.evaluation.agreement import Agreement
from latentdiff.evaluation.breakdown import failure_table, groups_of
from latentdiff.evaluation.prompts import TASKS
from latentdiff.evaluation.protocol import Outcome, Result, Score
from latentdiff.evaluation.references import References

FORMAT = 1  # of results.json
HOW_TO_MAKE_SCENES = "python tools/make_scenes.py data/scenes-test --count 2000 --split test --seed 1"


@dataclass(frozen=True)
class Scores:
    """Everything that an evaluation found out; `str` gives the table.

    Args:
        agreement: of the judge with people, where it was measured.
    """

    model: str
    model_hash: str
    settings: Mapping[str, Any]
    result: Result
    references: References | None = None
    notes: tuple[str, ...] = field(default=())
    agreement: Agreement | None = None

    def __str__(self) -> str:
        columns = {"model": self.result} | _columns_of(self.references)
        header = f"{'':20}" + "".join(f"{name:>{_WIDTH[name]}}" for name in columns)
        rows = [_row(label, columns, lambda result, task=task: result.tasks.get(task)) for task, label in TASKS.items()]
        rows += [_row("mean of tasks", columns, lambda result: result.mean)]
        rows += [_row("background", columns, lambda result: result.background)]
        return "\n".join([header, *rows, "", failure_table(self.result), *self._remarks()])

    def _remarks(self) -> list[str]:
        seeds = self.settings["seeds_per_prompt"]
        prompts = len({one.number for one in self.result.outcomes})
        remarks = [
            "",
            f"model {self.model or 'without a name'}: {prompts} prompts with {seeds} images each, 95 % intervals in brackets",
            "the judge shares no weights with the model",
        ]
        if self.agreement:
            remarks.append(f"it agrees with people on {self.agreement}")
        if self.references:
            remarks.append(f"VAE reconstructions: {self.references.psnr:.1f} dB")
        return [*remarks, *self.notes]

    def to_json(self) -> dict[str, Any]:
        """Plain values; scores are shares from 0 to 1 with their 95 % interval."""
        references = _columns_of(self.references)
        return {
            "format": FORMAT,
            "model": self.model,
            "model_hash": self.model_hash,
            "settings": dict(self.settings),
            **self.result.scores(),
            "references": {name.replace(" ", "_"): found.scores() for name, found in references.items()}
            | ({"psnr": self.references.psnr} if self.references else {}),
            "judge": self.agreement.to_json() if self.agreement else None,
            "notes": list(self.notes),
            "failures": [group.to_json() for group in groups_of(self.result)],
            "images": [_image(one) for one in self.result.outcomes],
        }


_WIDTH = {"model": 24, "real scenes": 14, "reconstructions": 18, "wrong captions": 17}


def _columns_of(references: References | None) -> dict[str, Result]:
    if references is None:
        return {}
    return {
        "real scenes": references.ceiling,
        "reconstructions": references.reconstructions,
        "wrong captions": references.floor,
    }


def _row(label: str, columns: Mapping[str, Result], score_of: Callable[[Result], Score | None]) -> str:
    cells = []
    for name, result in columns.items():
        score: Score | None = score_of(result)
        if score is None:
            text = "-"
        elif name == "model":
            text = f"{score.value:.3f} [{score.low:.3f}, {score.high:.3f}]"
        else:
            text = f"{score.value:.3f}"
        cells.append(f"{text:>{_WIDTH[name]}}")
    return f"{label:20}" + "".join(cells)


def _image(one: Outcome) -> dict[str, Any]:
    return {
        "number": one.number,
        "task": one.task,
        "prompt": one.prompt,
        "correct": one.correct,
        "reasons": list(one.reasons),
        "kind": one.kind,
        "background": one.background,
    }
