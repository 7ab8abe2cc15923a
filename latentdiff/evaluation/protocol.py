"""GenEval's protocol on scenes: make images of prompts, let the judge look at them, count what is right.

Ghosh et al. 2023, "GenEval: An Object-Focused Framework for Evaluating Text-to-Image Alignment". Ours differs in the
world (scenes of emoji), in the judge (trained on renders of that world) and in one more score, the background's.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from PIL import Image
from tqdm.auto import tqdm

from latentdiff.checkpoints.embedded import embedded_judge
from latentdiff.errors import DataError, UsageError
from latentdiff.evaluation.judge import Judge, Verdict
from latentdiff.evaluation.prompts import TASKS, EvaluationPrompt
from latentdiff.evaluation.rules import Kind, background_fits, failures
from latentdiff.evaluation.statistics import bootstrap_interval, wilson_interval

SEEDS_APART = 1000  # between one prompt's first seed and the next one's


class TextToImage(Protocol):
    """What is evaluated: a Pipeline, or anything that is called like one."""

    def __call__(self, prompt: Sequence[str], **options: Any) -> list[Image.Image]: ...


# (prompt, its images in the order of their seeds), called as soon as they are made.
OnImages = Callable[[EvaluationPrompt, Sequence[Image.Image]], None]


@dataclass(frozen=True)
class Outcome:
    """One image's judgement.

    Args:
        reasons: why it is wrong; empty if it is right.
        background: whether the background is the one asked for.
        index: of the image among those of its prompt.
        kind: of the first reason, from which others may follow; None if it is right.
    """

    number: int  # of the prompt
    task: str
    prompt: str
    reasons: tuple[str, ...]
    background: bool
    index: int = 0
    kind: Kind | None = None

    @property
    def correct(self) -> bool:
        return not self.reasons


@dataclass(frozen=True)
class Score:
    """A share of right images with its 95 % interval."""

    value: float
    low: float
    high: float
    images: int

    @classmethod
    def of(cls, verdicts: Iterable[bool]) -> Score:
        """Wilson's interval, which takes the images of one prompt as independent."""
        verdicts = list(verdicts)
        low, high = wilson_interval(sum(verdicts), len(verdicts))
        return cls(sum(verdicts) / len(verdicts), low, high, len(verdicts))


@dataclass(frozen=True)
class Result:
    """Scores of one set of images; `tasks` holds those tasks that occurred."""

    tasks: dict[str, Score]
    mean: Score  # of the tasks; its interval is a bootstrap over prompts
    background: Score
    outcomes: tuple[Outcome, ...]

    @classmethod
    def of(cls, outcomes: Sequence[Outcome]) -> Result:
        """Count outcomes, at least one."""
        by_task: dict[str, list[Outcome]] = {task: [one for one in outcomes if one.task == task] for task in TASKS}
        present = {task: found for task, found in by_task.items() if found}
        tasks = {task: Score.of(one.correct for one in found) for task, found in present.items()}
        low, high = bootstrap_interval([_share_of_each_prompt(found) for found in present.values()])
        value = sum(score.value for score in tasks.values()) / len(tasks)
        mean = Score(
            value, min(low, value), max(high, value), len(outcomes)
        )  # apart by rounding where all prompts agree
        return cls(tasks, mean, Score.of(one.background for one in outcomes), tuple(outcomes))

    def scores(self) -> dict[str, Any]:
        """Plain values of all scores, without the single outcomes."""
        tasks = {task: asdict(score) for task, score in self.tasks.items()}
        return {"tasks": tasks, "mean": asdict(self.mean), "background": asdict(self.background)}


def _share_of_each_prompt(outcomes: Sequence[Outcome]) -> list[float]:
    by_prompt: dict[int, list[bool]] = defaultdict(list)
    for one in outcomes:
        by_prompt[one.number].append(one.correct)
    return [sum(correct) / len(correct) for correct in by_prompt.values()]


def judged(prompt: EvaluationPrompt, seen: Verdict, index: int = 0) -> Outcome:
    """Compare what is seen in an image, the prompt's number `index`, with what the prompt asks for."""
    found = failures(prompt, seen)
    reasons, kind = tuple(one.reason for one in found), found[0].kind if found else None
    return Outcome(prompt.number, prompt.task, prompt.text, reasons, background_fits(prompt, seen), index, kind)


def score_prompts(
    pipeline: TextToImage,
    prompts: Sequence[EvaluationPrompt],
    *,
    judge: Judge | None = None,
    seeds_per_prompt: int = 4,
    steps: int = 25,
    guidance_scale: float | None = None,
    sampler: str = "ddim",
    batch_size: int = 16,
    progress: bool = True,
    on_images: OnImages | None = None,
) -> Result:
    """Score a model on prompts.

    Image j of prompt number i has seed 1000 i + j, so that a shorter list of prompts gives the same images.

    Args:
        judge: shares no weights with the model; None is the one that comes with latentdiff.
        guidance_scale: None is what is customary for the model.
        batch_size: images made at once; the scores do not depend on it.
        on_images: given each prompt's images as soon as they are made.

    Raises:
        DataError: no prompts, or prompts with words that the judge does not know.
        UsageError: an argument outside its domain.
    """
    judge = judge or Judge.load(embedded_judge())
    if not 1 <= seeds_per_prompt <= SEEDS_APART:
        raise UsageError(f"expected 1 to {SEEDS_APART} seeds per prompt, found {seeds_per_prompt}")
    check_words(prompts, judge)
    outcomes: list[Outcome] = []
    for group in _groups(prompts, max(1, batch_size // seeds_per_prompt), progress):
        texts = [prompt.text for prompt in group for _ in range(seeds_per_prompt)]
        seeds = [SEEDS_APART * prompt.number + offset for prompt in group for offset in range(seeds_per_prompt)]
        images = pipeline(
            texts,
            seed=seeds,
            steps=steps,
            guidance_scale=guidance_scale,
            sampler=sampler,
            batch_size=batch_size,
            progress=False,
        )
        verdicts = judge(images)
        for index, prompt in enumerate(group):
            own = slice(index * seeds_per_prompt, (index + 1) * seeds_per_prompt)
            outcomes += [judged(prompt, seen, offset) for offset, seen in enumerate(verdicts[own])]
            if on_images is not None:
                on_images(prompt, images[own])
    return Result.of(outcomes)


def check_words(prompts: Sequence[EvaluationPrompt], judge: Judge) -> None:
    """Make sure that the judge can tell whether the prompts are fulfilled.

    Raises:
        DataError: there are no prompts, or the judge does not know a noun, colour or background.
    """
    if not prompts:
        raise DataError("expected prompts to score, found none")
    known = {*judge.config.nouns, *judge.config.colours, *judge.config.backgrounds, None}
    for prompt in prompts:
        words = [word for need in prompt.include for word in (need.noun, need.colour)]
        words += [noun for noun, _ in prompt.exclude] + [prompt.background]
        if unknown := [word for word in words if word not in known]:
            raise DataError(f"the judge does not know {unknown[0]!r}, which {prompt.text!r} asks for")


def _groups(prompts: Sequence[EvaluationPrompt], size: int, progress: bool) -> Iterator[Sequence[EvaluationPrompt]]:
    with tqdm(total=len(prompts), unit="prompt", disable=None if progress else True, leave=False) as bar:
        for start in range(0, len(prompts), size):
            group = prompts[start : start + size]
            yield group
            bar.update(len(group))
