"""Text that changes on the way, by the grammar of AUTOMATIC1111's web UI.

    [a:b:when]   a, then b          [b:when]    b from then on          [a::when]   a until then
    [a|b|c]      another one at every step; parts may be empty

`when` with a point is a share of the steps, else the number of a step. What does not follow the grammar is text as it
stands; a `|` outside of `[]` makes the whole prompt that, as there.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum

from latentdiff.errors import UsageError
from latentdiff.prompts.weights import DEEPEST

_TOKEN = re.compile(r"[^\\\[\]():|]+|\\.|[\[\]():|]|\\", re.DOTALL)
_NUMBER = re.compile(r"\s*([+-]?(?:\d+\.\d*|\.\d+|\d+)(?:[eE][+-]?\d+)?)\s*")
_PARTNER = {")": "(", "]": "["}


@dataclass(frozen=True)
class Stage:
    """What a prompt says up to a step, that one included; steps count from 1."""

    last: int
    text: str


@dataclass(frozen=True)
class _Switch:
    """`[before:after:when]`"""

    before: Sequence[_Item]
    after: Sequence[_Item]
    when: str

    def last_before(self, steps: int) -> int:
        value = float(self.when)
        return min(steps, int(value * steps if "." in self.when else value))


@dataclass(frozen=True)
class _Turns:
    """`[a|b|c]`"""

    options: Sequence[Sequence[_Item]]


class _Mark(Enum):
    """What parts the inside of a bracket, as long as the bracket is open."""

    COLON = ":"
    BAR = "|"


_Item = str | _Mark | _Switch | _Turns


@dataclass
class _Bracket:
    """One that is not closed yet, with what stands in it so far; "" is the whole prompt."""

    kind: str
    items: list[_Item] = field(default_factory=list)
    is_sound: bool = True  # holds nothing but what the grammar allows
    depth: int = 0  # of what changes within

    @property
    def texts(self) -> list[_Item]:
        """The items, with the marks for letters."""
        if _Mark.BAR in self.items:
            raise _NotAPrompt
        return [":" if item is _Mark.COLON else item for item in self.items]

    def parts(self, mark: _Mark) -> list[list[_Item]]:
        """What stands between the marks; marks are items of their own."""
        found: list[list[_Item]] = [[]]
        for item in self.items:
            if item is mark:
                found.append([])
            else:
                found[-1].append(item)
        return found


class _NotAPrompt(Exception):
    """The grammar has no place for this; all of it is plain text."""


def stages_of(text: str, steps: int) -> list[Stage]:
    """The texts of a prompt over `steps` steps, in order; neighbours differ.

    Raises:
        UsageError: what changes is nested too deeply.
    """
    try:
        items = _read(text)
    except _NotAPrompt:
        return [Stage(steps, text)]
    ends = sorted({steps, *_ends(items, steps)})
    found: list[Stage] = []
    for last in ends:
        now = _at(items, last, steps)
        if found and found[-1].text == now:
            found.pop()
        found.append(Stage(last, now))
    return found


def _read(text: str) -> list[_Item]:
    stack = [_Bracket("")]
    for token in _TOKEN.findall(text):
        if token in "([":
            stack.append(_Bracket(token))
        elif token in ")]" and stack[-1].kind == _PARTNER[token]:
            _close(stack, token)
        elif token in ")]":
            _give_up(stack)  # whatever is open here would hold a bracket without a partner
            stack[-1].items.append(token)
        elif token == "\\":
            raise _NotAPrompt
        else:
            stack[-1].items.append(_Mark(token) if token in ":|" else token)
    _give_up(stack)
    return stack[0].texts


def _give_up(stack: list[_Bracket]) -> None:
    """Take all open brackets for letters."""
    while len(stack) > 1:
        bracket = stack.pop()
        stack[-1].items += _joined([bracket.kind, *bracket.texts])
        stack[-1].depth = max(stack[-1].depth, bracket.depth)


def _close(stack: list[_Bracket], mark: str) -> None:
    """Put the innermost bracket, which ends here, into the one around it."""
    inner = stack.pop()
    outer = stack[-1]
    change = _change(inner) if inner.kind == "[" and inner.is_sound else None
    if change is not None:
        outer.items.append(change)
        outer.depth = max(outer.depth, inner.depth + 1)
        if outer.depth > DEEPEST:
            raise UsageError(f"expected what changes in the prompt at most {DEEPEST} deep, found more")
        return
    colons = inner.items.count(_Mark.COLON)
    outer.is_sound &= inner.is_sound and colons <= (inner.kind == "(")
    outer.items += _joined([inner.kind, *inner.texts, mark])
    outer.depth = max(outer.depth, inner.depth)


def _joined(items: Iterable[_Item]) -> list[_Item]:
    """The items with neighbouring letters as one."""
    found: list[_Item] = []
    for item in items:
        if isinstance(item, str) and found and isinstance(found[-1], str):
            found[-1] += item
        else:
            found.append(item)
    return found


def _change(bracket: _Bracket) -> _Switch | _Turns | None:
    if _Mark.BAR in bracket.items:
        return None if _Mark.COLON in bracket.items else _Turns(bracket.parts(_Mark.BAR))
    *parts, last = bracket.parts(_Mark.COLON)
    number = _NUMBER.fullmatch(last[0]) if len(last) == 1 and isinstance(last[0], str) else None
    if number is None or len(parts) not in (1, 2):
        return None
    return _Switch(*([[], *parts] if len(parts) == 1 else parts), number[1])


def _ends(items: Sequence[_Item], steps: int) -> set[int]:
    """Last steps of what may end before the prompt does."""
    found: set[int] = set()
    for item in items:
        if isinstance(item, _Switch):
            last = item.last_before(steps)
            found |= {last} if last >= 1 else set()
            found |= _ends(item.before, steps) | _ends(item.after, steps)
        elif isinstance(item, _Turns):
            found |= set(range(1, steps + 1))
    return found


def _at(items: Sequence[_Item], step: int, steps: int) -> str:
    def said(item: _Item) -> str:
        if isinstance(item, _Switch):
            return _at(item.before if step <= item.last_before(steps) else item.after, step, steps)
        if isinstance(item, _Turns):
            return _at(item.options[(step - 1) % len(item.options)], step, steps)
        return str(item)

    return "".join(map(said, items))
