"""GenEval's rules (Ghosh et al. 2023): whether what is seen in an image fulfils a prompt.

They are kept as they are. Of each required noun, the `count` surest objects are looked at. An object that nobody asked
for does not fail an image, nor does one too many of a noun, except in counting, where the number must be exact.
Backgrounds are not part of GenEval and are scored apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import copysign, hypot
from typing import Literal, get_args

from latentdiff.evaluation.judge import Seen, Verdict
from latentdiff.evaluation.prompts import EvaluationPrompt, Requirement

Box = tuple[float, float, float, float]  # left, top, right, bottom

TOLERANCE = 0.1  # share of the two objects' size by which the distance of their centres is shortened
CLEAR = 0.5  # smallest part of the distance that must lie along an axis: within 60 degrees of it


Kind = Literal["missing", "wrong thing", "not clear", "wrong count", "wrong colour", "wrong relation"]
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True)
class Failure:
    """One part of a prompt that an image does not show; `kind` says which part, `reason` what was seen instead."""

    kind: Kind
    reason: str


def failures(prompt: EvaluationPrompt, seen: Verdict) -> list[Failure]:
    """Why an image does not show what the prompt asks for, causes before what follows from them; nothing if it does."""
    found_wrong: list[Failure] = []
    groups: list[list[Seen] | None] = []  # the objects that meet each requirement so far
    for need in prompt.include:
        found = objects_of(need.noun, seen)[: need.count]
        failure = _too_few(need, found, prompt, seen) if len(found) < need.count else _unlike(need, found, groups)
        found_wrong += [failure] if failure else []
        groups.append(None if failure else found)
    for noun, too_many in prompt.exclude:
        if (count := len(objects_of(noun, seen))) >= too_many:
            found_wrong.append(Failure("wrong count", f"expected fewer than {too_many} {noun}, saw {count}"))
    return found_wrong


def objects_of(noun: str, seen: Verdict) -> list[Seen]:
    """The objects of a noun, from the surest to the least sure."""
    return sorted((thing for thing in seen.objects if thing.noun == noun), key=lambda thing: -thing.score)


def background_fits(prompt: EvaluationPrompt, seen: Verdict) -> bool:
    return prompt.background is None or prompt.background == seen.background


def _too_few(need: Requirement, found: Sequence[Seen], prompt: EvaluationPrompt, seen: Verdict) -> Failure:
    asked = {each.noun for each in prompt.include}
    kind: Kind = "wrong count" if found else "missing"
    if seen.unclear:  # what is missing may be there, melted
        kind = "not clear"
    elif not found and any(thing.noun not in asked for thing in seen.objects):
        kind = "wrong thing"
    return Failure(kind, f"expected {need.count} {need.noun}, saw {len(found)}")


def _unlike(need: Requirement, found: Sequence[Seen], groups: Sequence[list[Seen] | None]) -> Failure | None:
    """What is wrong with things of which there are enough."""
    colours = [thing.colour for thing in found]
    if need.colour and colours.count(need.colour) < need.count:
        seen = ", ".join(colour or "own colours" for colour in colours)
        return Failure("wrong colour", f"expected {need.count} {need.colour} {need.noun}, saw {seen}")
    if need.position:
        relation, target = need.position
        others = groups[target]
        if others is None:
            return Failure("wrong relation", f"nothing for the {need.noun} to be {relation}")
        if any(relation not in relations(thing.box, other.box) for thing in found for other in others):
            return Failure("wrong relation", f"expected the {need.noun} {relation} the {others[0].noun}")
    return None


def relations(a: Box, b: Box) -> set[str]:
    """How `a` lies to `b`: none, one or two of "left of", "right of", "above", "below".

    The offset of the centres is shortened on each axis by a tenth of the two objects' size there; what is left along an
    axis must exceed half of the whole distance.
    """
    dx, dy = (((a[axis] + a[axis + 2]) - (b[axis] + b[axis + 2])) / 2 for axis in (0, 1))
    distance = hypot(dx, dy)
    if distance == 0:
        return set()
    across, down = (copysign(_shortened(a, b, axis, offset), offset) / distance for axis, offset in ((0, dx), (1, dy)))
    held = {"left of": -across, "right of": across, "above": -down, "below": down}
    return {name for name, part in held.items() if part > CLEAR}


def _shortened(a: Box, b: Box, axis: int, offset: float) -> float:
    sizes = (a[axis + 2] - a[axis]) + (b[axis + 2] - b[axis])
    return max(abs(offset) - TOLERANCE * sizes, 0.0)
