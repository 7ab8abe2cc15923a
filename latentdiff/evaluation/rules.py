"""GenEval's rules (Ghosh et al. 2023): whether what is seen in an image fulfils a prompt.

They are kept as they are. Of each required noun, the `count` surest objects are looked at. An object that nobody asked
for does not fail an image, nor does one too many of a noun, except in counting, where the number must be exact.
Backgrounds are not part of GenEval and are scored apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import copysign, hypot

from latentdiff.evaluation.judge import Seen, Verdict
from latentdiff.evaluation.prompts import EvaluationPrompt, Requirement

Box = tuple[float, float, float, float]  # left, top, right, bottom

TOLERANCE = 0.1  # share of the two objects' size by which the distance of their centres is shortened
CLEAR = 0.5  # smallest part of the distance that must lie along an axis: within 60 degrees of it


def failures(prompt: EvaluationPrompt, seen: Verdict) -> list[str]:
    """Why an image does not show what the prompt asks for; nothing if it does."""
    reasons: list[str] = []
    groups: list[list[Seen] | None] = []  # the objects that meet each requirement so far
    for need in prompt.include:
        found = objects_of(need.noun, seen)[: need.count]
        reason = _shortcoming(need, found, groups)
        reasons += [reason] if reason else []
        groups.append(None if reason else found)
    for noun, too_many in prompt.exclude:
        if (count := len(objects_of(noun, seen))) >= too_many:
            reasons.append(f"expected fewer than {too_many} {noun}, saw {count}")
    return reasons


def objects_of(noun: str, seen: Verdict) -> list[Seen]:
    """The objects of a noun, from the surest to the least sure."""
    return sorted((thing for thing in seen.objects if thing.noun == noun), key=lambda thing: -thing.score)


def background_fits(prompt: EvaluationPrompt, seen: Verdict) -> bool:
    return prompt.background is None or prompt.background == seen.background


def _shortcoming(need: Requirement, found: Sequence[Seen], groups: Sequence[list[Seen] | None]) -> str | None:
    if len(found) < need.count:
        return f"expected {need.count} {need.noun}, saw {len(found)}"
    colours = [thing.colour for thing in found]
    if need.colour and colours.count(need.colour) < need.count:
        seen = ", ".join(colour or "own colours" for colour in colours)
        return f"expected {need.count} {need.colour} {need.noun}, saw {seen}"
    if need.position:
        relation, target = need.position
        others = groups[target]
        if others is None:
            return f"nothing for the {need.noun} to be {relation}"
        if any(relation not in relations(thing.box, other.box) for thing in found for other in others):
            return f"expected the {need.noun} {relation} the {others[0].noun}"
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
