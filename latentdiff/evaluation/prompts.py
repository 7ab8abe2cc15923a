"""What is asked of a model: prompts in GenEval's schema, each with what its image has to show.

{"tag": "position", "include": [{"class": "key", "count": 1}, {"class": "fox", "count": 1, "position": ["left of", 0]}],
 "background": "pink", "prompt": "a photo of a fox to the left of a key on a pink background"}
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from latentdiff.errors import DataError
from latentdiff.reading.json import parse_json
from latentdiff.reading.plain import read_text

# GenEval's six tasks (Ghosh et al. 2023) in its order, and what they are called in tables.
TASKS = {
    "single_object": "single object",
    "two_object": "two objects",
    "counting": "counting",
    "colors": "colours",
    "position": "position",
    "color_attr": "colour attribution",
}

# The kind of scene that shows what a task asks for.
TASK_OF_KIND = {
    "single": "single_object",
    "two": "two_object",
    "counting": "counting",
    "colour": "colors",
    "position": "position",
    "attribution": "color_attr",
}


@dataclass(frozen=True)
class Requirement:
    """At least `count` objects of a noun; in a colour, or in a relation to those of an earlier requirement.

    Args:
        colour: None where any colour will do.
        position: "left of", "right of", "above" or "below", and the index of the requirement that it relates to.
    """

    noun: str
    count: int = 1
    colour: str | None = None
    position: tuple[str, int] | None = None


@dataclass(frozen=True)
class EvaluationPrompt:
    """A prompt of one task.

    Args:
        exclude: pairs (noun, n): n or more of that noun are wrong.
        number: its place in the whole list, from which the seeds of its images are made.
    """

    task: str
    text: str
    include: tuple[Requirement, ...]
    exclude: tuple[tuple[str, int], ...] = ()
    background: str | None = None
    number: int = 0

    @classmethod
    def from_json(cls, line: Mapping[str, Any], number: int = 0) -> EvaluationPrompt:
        """Read one line of GenEval's schema.

        Raises:
            KeyError, TypeError, ValueError: it is none.
        """
        include = tuple(_requirement(entry) for entry in line["include"])
        exclude = tuple((entry["class"], int(entry["count"])) for entry in line.get("exclude", ()))
        if line["tag"] not in TASKS:
            raise ValueError(f"unknown task {line['tag']!r}")
        return cls(line["tag"], line["prompt"], include, exclude, line.get("background"), number)

    def to_json(self) -> dict[str, Any]:
        """The line in GenEval's schema."""
        line: dict[str, Any] = {"tag": self.task, "include": [_entry(need) for need in self.include]}
        if self.exclude:
            line["exclude"] = [{"class": noun, "count": count} for noun, count in self.exclude]
        if self.background:
            line["background"] = self.background
        return line | {"prompt": self.text}


def _requirement(entry: Mapping[str, Any]) -> Requirement:
    position = entry.get("position")
    return Requirement(
        entry["class"], int(entry["count"]), entry.get("color"), (position[0], int(position[1])) if position else None
    )


def _entry(need: Requirement) -> dict[str, Any]:
    entry: dict[str, Any] = {"class": need.noun, "count": need.count}
    if need.colour:
        entry["color"] = need.colour
    if need.position:
        entry["position"] = list(need.position)
    return entry


def read_prompts(path: Path | None = None, *, limit: int | None = None) -> list[EvaluationPrompt]:
    """Read prompts, by default those that come with latentdiff; `limit` keeps the first so many of each task.

    Raises:
        DataError: a line is not in GenEval's schema.
    """
    own = files("latentdiff.evaluation") / "prompts.jsonl"
    text = own.read_text(encoding="utf-8") if path is None else read_text(path, DataError)
    prompts: list[EvaluationPrompt] = []
    taken: Counter[str] = Counter()
    for number, line in enumerate(text.splitlines()):
        try:
            prompt = EvaluationPrompt.from_json(parse_json(line, "it", DataError), number)
        except (KeyError, TypeError, ValueError, AttributeError, DataError) as error:
            name = path or "prompts.jsonl"
            raise DataError(
                f"{name} line {number + 1}: expected a prompt in GenEval's schema, found {line[:60]!r}"
            ) from error
        taken[prompt.task] += 1
        if limit is None or taken[prompt.task] <= limit:
            prompts.append(prompt)
    return prompts


def prompt_of_scene(scene: Mapping[str, Any], text: str) -> EvaluationPrompt:
    """What an image must show to pass for a real scene, by the rules of its task.

    Args:
        scene: as tools/make_scenes.py writes it, with a kind from TASK_OF_KIND.
        text: its caption.
    """
    task = TASK_OF_KIND[scene["kind"]]
    counts = Counter((thing["noun"], thing["colour"]) for thing in scene["objects"])
    include = [Requirement(noun, count, colour) for (noun, colour), count in counts.items()]
    if scene["relation"]:
        first, second = include
        include = [second, Requirement(first.noun, first.count, first.colour, (scene["relation"], 0))]
    exclude = _one_too_many(include) if task == "counting" else ()
    return EvaluationPrompt(task, text, tuple(include), exclude, scene["background"])


def _one_too_many(include: Sequence[Requirement]) -> tuple[tuple[str, int], ...]:
    return tuple((need.noun, need.count + 1) for need in include)
