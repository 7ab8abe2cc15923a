"""The domains of options: what a value may be, and what it becomes. Loads no heavy library.

A domain is a callable `(name, value) -> value` that takes numbers of any library and gives Python's.
"""

from __future__ import annotations

import math
import operator
import os
import reprlib
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real as RealNumber
from typing import Any, cast

from latentdiff.errors import UsageError

LARGEST_SEED = 2**64 - 1


def refusal(name: str, expected: str, value: object) -> UsageError:
    """The error that says what an option takes and what was found."""
    return UsageError(f"expected {name} to be {expected}, found {reprlib.repr(value)}")


@dataclass(frozen=True)
class Whole:
    """A whole number from `low` to `high`, both included."""

    low: int | None = None
    high: int | None = None
    metavar: str = "N"

    def __call__(self, name: str, value: Any) -> int:
        try:
            number = operator.index(value)
        except TypeError:
            number = None
        if isinstance(value, bool) or number is None or not _lies_within(number, self.low, self.high):
            raise refusal(name, f"a whole number{_limits(self.low, self.high)}", value)
        return number


@dataclass(frozen=True)
class Real:
    """A finite number from `low` to `high`, both included."""

    low: float | None = None
    high: float | None = None
    metavar: str = "X"

    def __call__(self, name: str, value: Any) -> float:
        is_number = not isinstance(value, bool) and isinstance(value, RealNumber) and math.isfinite(value)
        if not is_number or not _lies_within(float(value), self.low, self.high):
            raise refusal(name, f"a finite number{_limits(self.low, self.high)}", value)
        return float(value)


@dataclass(frozen=True)
class Factor:
    """How many times larger: a number above 1 up to `most`, or a text such as "2x"."""

    most: float
    metavar: str = "2x"

    def __call__(self, name: str, value: Any) -> float:
        try:
            number = float(value.strip().removesuffix("x")) if isinstance(value, str) else Real()(name, value)
        except (ValueError, UsageError):
            number = math.nan
        if not 1.0 < number <= self.most:
            raise refusal(name, f'how many times larger, above 1 to {self.most:g}, as in "2x"', value)
        return number


@dataclass(frozen=True)
class Interval:
    """Two finite numbers, 0 <= low < high."""

    metavar: str = "LOW HIGH"

    def __call__(self, name: str, value: Any) -> tuple[float, float]:
        try:
            low, high = (Real(0.0)(name, end) for end in value)
        except (TypeError, ValueError, UsageError):
            raise refusal(name, "two finite numbers, 0 <= low < high", value) from None
        if not low < high:
            raise refusal(name, "two finite numbers, 0 <= low < high", value)
        return low, high


@dataclass(frozen=True)
class Pair:
    """Two whole numbers, each `low` or more."""

    low: int
    metavar: str = "Y X"

    def __call__(self, name: str, value: Any) -> tuple[int, int]:
        try:
            first, second = (Whole(self.low)(name, number) for number in value)
        except (TypeError, ValueError, UsageError):
            raise refusal(name, f"two whole numbers of {self.low} or more", value) from None
        return first, second


@dataclass(frozen=True)
class Numbers:
    """Some finite numbers of `low` or more, or a text that has them between commas; `count` of them, or any."""

    count: int | None = None
    low: float = -math.inf
    metavar: str = "X,X,..."

    def __call__(self, name: str, value: Any) -> tuple[float, ...]:
        try:
            numbers = tuple(map(float, value.split(",") if isinstance(value, str) else value))
        except (TypeError, ValueError):
            numbers = ()
        is_right = numbers and self.count in (None, len(numbers))
        if not is_right or not all(math.isfinite(number) and number >= self.low for number in numbers):
            of_low = "" if self.low == -math.inf else f" of {self.low:g} or more"
            raise refusal(name, f"{self.count or 'some'} finite numbers{of_low}", value)
        return numbers


@dataclass(frozen=True)
class Seeds:
    """One seed, or a list of them."""

    metavar: str = "N"

    def __call__(self, name: str, value: Any) -> int | list[int]:
        one = Whole(0, LARGEST_SEED)
        if isinstance(value, str | bytes) or not (hasattr(value, "__len__") and getattr(value, "shape", True) != ()):
            return one(name, value)
        return [one(f"each {name}", seed) for seed in value]


@dataclass(frozen=True)
class Texts:
    """One text, or a list of them."""

    metavar: str = "TEXT"

    def __call__(self, name: str, value: Any) -> str | list[str]:
        if isinstance(value, str):
            return value
        texts = list(cast(Sequence[Any], value)) if isinstance(value, Sequence) else [value]
        if not all(isinstance(text, str) for text in texts):
            raise refusal(name, "a text or a list of texts", cast(object, value))
        return texts


@dataclass(frozen=True)
class Choice:
    """One of some names."""

    names: tuple[str, ...]

    def __call__(self, name: str, value: Any) -> str:
        if not isinstance(value, str) or value not in self.names:
            raise refusal(name, f"one of {', '.join(self.names)}", value)
        return value


@dataclass(frozen=True)
class ChoiceOrFile(Choice):
    """One of some names, or a file."""

    metavar: str = "NAME|FILE"

    def __call__(self, name: str, value: Any) -> str:
        if isinstance(value, os.PathLike) or (isinstance(value, str) and value not in self.names):
            path = os.fspath(cast("str | os.PathLike[str]", value))
            if os.path.isfile(path):
                return path
            raise refusal(name, f"one of {', '.join(self.names)}, or a file", path)
        return super().__call__(name, value)


@dataclass(frozen=True)
class Place:
    """A file, a folder or an id, by its name."""

    def __call__(self, name: str, value: Any) -> Any:
        if not isinstance(value, str | os.PathLike) or not os.fspath(cast(str, value)):
            raise refusal(name, "a path or an id", cast(object, value))
        return cast(Any, value)


@dataclass(frozen=True)
class YesNo:
    """True or False."""

    def __call__(self, name: str, value: Any) -> bool:
        if not isinstance(value, bool) and type(value).__name__ != "bool":  # numpy's is no subclass
            raise refusal(name, "True or False", value)
        return bool(value)


@dataclass(frozen=True)
class Made:
    """Things that something of ours makes, one or several; they bear a mark.

    expected: the same in words.
    """

    mark: str
    expected: str

    def __call__(self, name: str, value: Any) -> tuple[Any, ...]:
        things = tuple(cast(Sequence[Any], value)) if isinstance(value, list | tuple) else (value,)
        if not all(getattr(thing, self.mark, False) for thing in things):
            raise refusal(name, self.expected, cast(object, value))
        return things


@dataclass(frozen=True)
class BlockScales:
    """Names of blocks and how strongly something acts on them, 0 or more; or the name of a preset."""

    presets: tuple[str, ...]

    def __call__(self, name: str, value: Any) -> str | dict[str, float]:
        if isinstance(value, str) and value in self.presets:
            return value
        try:
            given = dict(part.rsplit("=", 1) for part in value.split(",")) if isinstance(value, str) else dict(value)
            scales = {str(block): Real(0)(name, float(scale)) for block, scale in given.items()}
        except (TypeError, ValueError, UsageError):
            scales = {}
        if not scales:
            raise refusal(name, f"{' or '.join(self.presets)}, or blocks with numbers, as in up_blocks.1=0.5", value)
        return scales


@dataclass(frozen=True)
class Function:
    """Something to be called."""

    def __call__(self, name: str, value: Any) -> Any:
        if not callable(value):
            raise refusal(name, "a function", value)
        return value


def _lies_within(number: float, low: float | None, high: float | None) -> bool:
    return (low is None or number >= low) and (high is None or number <= high)


def _limits(low: float | None, high: float | None) -> str:
    if high is None:
        return "" if low is None else f" of {low:g} or more"
    ends = ["2**64 - 1" if end == LARGEST_SEED else f"{end:g}" for end in (low or 0, high)]
    return f" of {ends[0]} to {ends[1]}"
