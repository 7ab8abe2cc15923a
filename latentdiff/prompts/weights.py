"""Attention weights in a prompt: text -> runs of text that share one weight.

Two grammars. That of AUTOMATIC1111's web UI: `(a)` times 1.1, `[a]` divided by 1.1, `(a:1.3)` times 1.3, all of them
multiplied when nested; a backslash before a bracket makes it a letter; `BREAK` begins a new chunk. That of ComfyUI: only
round brackets, and a number replaces what the brackets around it say.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from latentdiff.errors import UsageError

EMPHASIS = 1.1
DEEPEST = 100  # brackets within brackets, where reading them is recursive

_TOKEN = re.compile(
    r"\\(?P<letter>[()\[\]\\])|\\|(?P<open>[(\[])|:\s*(?P<number>[+-]?(?:\d+\.?\d*|\.\d+))\s*\)|(?P<close>[)\]])|[^\\()\[\]:]+|:"
)
_PARTNER = {")": "(", "]": "["}
_FACTORS = {"(": EMPHASIS, "[": 1 / EMPHASIS}
_BREAK = re.compile(r"\s*\bBREAK\b\s*")


@dataclass(frozen=True)
class Run:
    """A piece of a prompt whose tokens all have the same weight."""

    text: str
    weight: float = 1.0


Stretch = list[Run]  # what lies between two BREAKs


def a1111_runs(text: str) -> list[Stretch]:
    """Runs by the grammar of AUTOMATIC1111's web UI, one list for each stretch between `BREAK`s.

    Brackets that are not closed end with the text; a closing one without a partner is a letter. A `BREAK` within
    brackets breaks, too, where that program, by an oversight, reads it as a word.

    Raises:
        UsageError: a weight is too large to be a number.
    """
    texts: list[str | None] = []  # None is a BREAK
    weights: list[float] = []
    open_at: dict[str, list[int]] = {"(": [], "[": []}

    def add(text: str | None) -> None:
        texts.append(text)
        weights.append(1.0)

    def close(bracket: str, factor: float) -> None:
        for place in range(open_at[bracket].pop(), len(weights)):
            weights[place] *= factor

    for token in _TOKEN.finditer(text):
        found = token.group()
        if token["letter"] is not None:
            add(token["letter"])
        elif token["open"]:
            open_at[found].append(len(texts))
        elif token["number"] and open_at["("]:
            close("(", float(token["number"]))
        elif token["close"] and open_at[_PARTNER[found]]:
            close(_PARTNER[found], _FACTORS[_PARTNER[found]])
        elif found != "\\":
            first, *others = _BREAK.split(found)
            add(first)
            for part in others:
                add(None)
                add(part)
    for bracket, factor in _FACTORS.items():
        while open_at[bracket]:
            close(bracket, factor)
    stretches: list[Stretch] = [[]]
    for piece, weight in zip(texts, weights, strict=True):
        if piece is None:
            stretches.append([])
        else:
            stretches[-1].append(Run(piece, weight))
    return [_merged(stretch) for stretch in stretches]


def comfy_runs(text: str) -> list[Stretch]:
    """Runs by ComfyUI's grammar; always one stretch, as it knows no `BREAK`.

    The last `:` within brackets counts. Brackets that are not closed are letters.

    Raises:
        UsageError: brackets are nested too deeply, or a weight is too large to be a number.
    """
    hidden = text.replace("\\)", "\0\1").replace("\\(", "\0\2")
    found = [
        Run(run.text.replace("\0\1", ")").replace("\0\2", "("), run.weight) for run in _comfy(hidden, 1.0, DEEPEST)
    ]
    return [_merged(found)]


def _comfy(text: str, weight: float, depth: int) -> list[Run]:
    if not depth:
        raise UsageError(f"expected brackets in the prompt at most {DEEPEST} deep, found more")
    runs = []
    for item in _top_level(text):
        if not (len(item) >= 2 and item[0] == "(" and item[-1] == ")"):
            runs.append(Run(item, weight))
            continue
        inner, own = item[1:-1], weight * EMPHASIS
        before, colon, number = inner.rpartition(":")
        if colon and before:
            try:
                inner, own = before, float(number)
            except ValueError:
                pass
        runs += _comfy(inner, own, depth - 1)
    return runs


def _top_level(text: str) -> list[str]:
    """The text cut before and behind its outermost pairs of brackets."""
    items, current, depth = [], "", 0
    for letter in text:
        if letter == "(":
            if depth == 0 and current:
                items.append(current)
                current = ""
            depth += 1
            current += letter
        elif letter == ")":
            depth -= 1
            current += letter
            if depth == 0:
                items.append(current)
                current = ""
        else:
            current += letter
    return [*items, current] if current else items


def _merged(runs: Stretch) -> Stretch:
    """Neighbours of equal weight as one run, without empty ones."""
    merged: Stretch = []
    for run in runs:
        if not math.isfinite(run.weight):
            raise UsageError(f"expected finite weights in the prompt, found {run.weight} for {run.text[:40]!r}")
        if merged and merged[-1].weight == run.weight:
            merged[-1] = Run(merged[-1].text + run.text, run.weight)
        else:
            merged.append(run)
    return [run for run in merged if run.text]
