"""The axes of a grid: a setting, and the values that it takes. Loads no heavy library."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import product
from typing import Any

from latentdiff.errors import UsageError
from latentdiff.request.domains import Choice, Real, Seeds, Whole, YesNo
from latentdiff.request.options import OPTIONS

PROMPT = "prompt"
_YES_NO = {"true": True, "false": False}
_READ: dict[type, Callable[[str], Any]] = {
    Choice: str,
    Whole: int,
    Seeds: int,
    Real: float,
    YesNo: lambda text: _YES_NO[text.lower()],
}
_NO_SETTING = ("num_images", "batch_size")
NAMES = (
    PROMPT,
    *(
        name
        for name, option in OPTIONS.items()
        if type(option.domain) in _READ and option.flags != () and name not in _NO_SETTING
    ),
)
MOST = 1_000  # cells of a grid


@dataclass(frozen=True)
class Axis:
    """A setting and its values; of the prompt, the first is a part of it which the others take the place of."""

    name: str
    values: tuple[Any, ...]

    @classmethod
    def parse(cls, text: str) -> Axis:
        """Read "NAME=VALUE,VALUE,..."; values of the prompt have | between them.

        Raises:
            UsageError: there is no such setting, or a value outside its domain.
        """
        name, equals, rest = text.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or name not in NAMES:
            near = get_close_matches(name, NAMES, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"settings are {', '.join(NAMES)}"
            raise UsageError(f"expected an axis SETTING=VALUE,VALUE,..., found {text!r}; {hint}")
        words = [word.strip() for word in rest.split("|" if name == PROMPT else ",")]
        if not all(words) or len(set(words)) < len(words):
            raise UsageError(f"expected values, each once, for the axis {name}, found {rest!r}")
        return cls(name, tuple(words) if name == PROMPT else tuple(_value(name, word) for word in words))

    @property
    def labels(self) -> list[str]:
        """What stands beside the rows or above the columns."""
        plain = self.name.replace("_", " ")
        return [str(value) if self.name == PROMPT else f"{plain} {_shown(value)}" for value in self.values]

    def applied(self, value: Any, prompt: str, options: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
        """Prompt and options where this axis has that value.

        Raises:
            UsageError: the prompt does not hold what is to be replaced.
        """
        if self.name != PROMPT:
            return prompt, {**options, self.name: value}
        if self.values[0] not in prompt:
            raise UsageError(f"the prompt does not hold {self.values[0]!r}, which the other values take the place of")
        return prompt.replace(self.values[0], value), dict(options)


# Places on the axes, prompt, options.
Cell = tuple[tuple[int, ...], str, dict[str, Any]]


def cells(axes: Sequence[Axis], prompt: str, options: Mapping[str, Any]) -> list[Cell]:
    """All combinations; the last axis runs fastest.

    Raises:
        UsageError: an axis comes twice, the grid is too large, or the prompt does not hold what is to be replaced.
    """
    names = [axis.name for axis in axes]
    if len(set(names)) < len(names):
        raise UsageError(f"expected each setting on one axis, found {', '.join(names)}")
    found: list[Cell] = []
    for places in product(*(range(len(axis.values)) for axis in axes)):
        text, own = prompt, dict(options)
        for axis, place in zip(axes, places, strict=True):
            text, own = axis.applied(axis.values[place], text, own)
        found.append((places, text, own))
        if len(found) > MOST:
            raise UsageError(f"expected a grid of at most {MOST:,} images, found more")
    return found


def _value(name: str, word: str) -> Any:
    domain = OPTIONS[name].domain
    try:
        value = _READ[type(domain)](word)
    except (ValueError, KeyError):
        value = word  # which the domain refuses
    return domain(name, value)


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
