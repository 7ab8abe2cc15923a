"""The words that a small model knows, from a file in its folder, and what of a prompt lies outside them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from latentdiff.errors import CheckpointError
from latentdiff.reading.json import read_object

FILE = "words.json"
KINDS = ("things", "colours", "backgrounds", "sizes", "counts", "relations")

_NUMBERS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty",
)  # fmt: skip
_NEAR = 0.75  # share of letters in common, see `difflib`
_FAR = 2.0  # times the size of the training, or that part of it


@dataclass(frozen=True)
class Words:
    """What a model was trained on, in words.

    Attributes:
        kinds: for each of `KINDS`, what there is of it, as it is written in a prompt.
        all: every word of the captions.
        size: side of the training's images in pixels.
    """

    kinds: dict[str, tuple[str, ...]]
    all: frozenset[str]
    size: int

    def with_texts(self, texts: Iterable[str]) -> Words:
        """These words and those of other captions, which the model was trained on later."""
        return replace(self, all=self.all.union(*map(split_words, texts)))

    def unknown(self, texts: Iterable[str]) -> list[str]:
        """The words of texts that were in no caption, each once; numbers are none of them."""
        found = dict.fromkeys(word for text in texts for word in split_words(text))
        return [word for word in found if word not in self.all and not _is_number(word)]

    def remarks(self, prompts: Sequence[str], width: int | None = None, height: int | None = None) -> Iterator[str]:
        """One line about each way in which a request goes beyond the training; none where it does not.

        Args:
            prompts: what is asked for.
            width, height: of the images in pixels, None for that of the training.
        """
        found = list(dict.fromkeys(word for prompt in prompts for word in split_words(prompt)))
        counted = {word for word in found if _is_number(word)}
        if unknown := self.unknown(prompts):
            yield f"this model does not know {_quoted(unknown)}{self._nearest(unknown)}; latentdiff words lists what it knows"
        last = self.kinds["counts"][-1] if self.kinds["counts"] else None
        if last in _NUMBERS:
            highest = _NUMBERS.index(last)
            if many := [word for word in found if word in counted and _value(word) > highest]:
                yield f"this model counts to {last}, and was asked for {_quoted(many)}"
            if digits := [word for word in found if word.isdecimal() and 1 <= _value(word) <= highest]:
                names = ", ".join(f'"{_NUMBERS[_value(word)]}" for "{word}"' for word in digits)
                yield f"this model reads numbers as words: write {names}"
        sides = (width or self.size, height or self.size)
        if max(sides) > _FAR * self.size or min(sides) < self.size / _FAR:
            yield (
                f"{sides[0]}x{sides[1]} is far from the {self.size}x{self.size} pixels that this model was trained on;"
                " things may be doubled or dissolve"
            )

    def _nearest(self, unknown: Sequence[str]) -> str:
        candidates = sorted(
            {word for entries in self.kinds.values() for entry in entries for word in entry.split()} | self.all
        )
        near = {word: difflib.get_close_matches(word, candidates, n=1, cutoff=_NEAR) for word in unknown}
        pairs = [f'"{matches[0]}"' for matches in near.values() if matches]
        return f" (nearest: {', '.join(dict.fromkeys(pairs))})" if pairs else ""


def _is_number(word: str) -> bool:
    return word.isdecimal() or word in _NUMBERS


def read_words(folder: Path) -> Words | None:
    """The words of a model's folder; None where it does not say.

    Raises:
        CheckpointError: the file is damaged.
    """
    path = Path(folder) / FILE
    if not path.is_file():
        return None
    return words_from(read_object(path), str(path))


def words_from(found: Mapping[str, Any], what: str) -> Words:
    """Words from JSON values as `as_json` makes them; `what` names their source in errors.

    Raises:
        CheckpointError: they are something else.
    """
    size, lists = found.get("size"), [found.get(name) for name in (*KINDS, "words")]
    if not all(
        isinstance(entry, str) for entries in lists for entry in (entries if isinstance(entries, list) else [None])
    ):
        raise CheckpointError(f"{what} must hold lists of words called {', '.join(KINDS)} and words; download it again")
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise CheckpointError(f"{what} must hold a size in pixels, found {size!r}; download it again")
    *kinds, words = lists
    return Words({kind: tuple(entries) for kind, entries in zip(KINDS, kinds, strict=True)}, frozenset(words), size)


def as_json(words: Words) -> dict[str, Any]:
    """What `words_from` reads."""
    return {
        **{kind: list(entries) for kind, entries in words.kinds.items()},
        "words": sorted(words.all),
        "size": words.size,
    }


def split_words(text: str) -> list[str]:
    """The words and numbers of a text, in lower case."""
    # In all scripts; names of added words such as <mine>, and what belongs to a prompt's syntax, are not the model's.
    return re.findall(r"[^\W\d_]+|\d+", re.sub(r"<[^<>]*>", " ", text.lower()))


def _value(word: str) -> int:
    return int(word) if word.isdecimal() else _NUMBERS.index(word)


def _quoted(words: Sequence[str]) -> str:
    return ", ".join(f'"{word}"' for word in words)
