"""How often the judge calls an image what people call it: the reason to believe its scores, or not to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from latentdiff.errors import CheckpointError
from latentdiff.evaluation.judge import Verdict
from latentdiff.evaluation.prompts import EvaluationPrompt
from latentdiff.evaluation.rules import failures
from latentdiff.reading.json import read_object
from latentdiff.reading.plain import exists

AGREEMENT_NAME = "agreement.json"  # in the judge's folder
NEAR = 0.02  # in agreement; a hundred labels do not tell less apart


@dataclass(frozen=True)
class Agreement:
    """Images that people called right or wrong, and the judge too."""

    right_by_both: int
    wrong_by_both: int
    false_right: int  # wrong to people and right to the judge
    false_wrong: int  # right to people and wrong to the judge

    @classmethod
    def of(cls, judged: Sequence[bool], seen: Sequence[bool]) -> Agreement:
        """Count pairs of verdicts, the judge's and people's, True for right."""
        pairs = list(zip(judged, seen, strict=True))
        return cls(*(pairs.count(pair) for pair in ((True, True), (False, False), (True, False), (False, True))))

    @property
    def images(self) -> int:
        return self.right_by_both + self.wrong_by_both + self.false_right + self.false_wrong

    @property
    def share(self) -> float:
        """Of images on which both agree."""
        return (self.right_by_both + self.wrong_by_both) / self.images

    def __str__(self) -> str:
        right, wrong = self.right_by_both + self.false_wrong, self.wrong_by_both + self.false_right
        return (
            f"{self.share:.0%} of {self.images} images: it passed {self.false_right} of {wrong} wrong"
            f" ones and failed {self.false_wrong} of {right} right ones"
        )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def read_agreement(folder: Path) -> Agreement | None:
    """What is known of a judge's agreement with people; None where nobody has measured it.

    Raises:
        CheckpointError: the file in the judge's folder is damaged.
    """
    if not exists(folder / AGREEMENT_NAME):
        return None
    try:
        counts = {name: int(value) for name, value in read_object(folder / AGREEMENT_NAME).items()}
        agreement = Agreement(**counts)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"the judge's {AGREEMENT_NAME} in {folder} is damaged: {error}") from error
    if min(counts.values()) < 0 or agreement.images == 0:
        raise CheckpointError(f"the judge's {AGREEMENT_NAME} in {folder} is damaged: expected counts, found {counts}")
    return agreement


def right_at(threshold: float, prompts: Sequence[EvaluationPrompt], verdicts: Sequence[Verdict]) -> list[bool]:
    """Whether each image is right where only things of at least this score count as seen."""
    sure = [replace(one, objects=tuple(thing for thing in one.objects if thing.score > threshold)) for one in verdicts]
    return [not failures(prompt, seen) for prompt, seen in zip(prompts, sure, strict=True)]


def best_threshold(prompts: Sequence[EvaluationPrompt], verdicts: Sequence[Verdict], seen: Sequence[bool]) -> float:
    """The threshold at which the judge agrees with people most often, and passes as many images as they do.

    Of all thresholds that are within NEAR of the best, that at which it is least partial; of several, the middle one.

    Args:
        verdicts: of a judge with a threshold near 0.
    """
    found = {
        number / 100: Agreement.of(right_at(number / 100, prompts, verdicts), seen) for number in range(2, 99)
    }
    enough = max(one.share for one in found.values()) - NEAR
    partial = {at: abs(one.false_right - one.false_wrong) for at, one in found.items() if one.share >= enough}
    best = [at for at, difference in partial.items() if difference == min(partial.values())]
    return best[len(best) // 2]
