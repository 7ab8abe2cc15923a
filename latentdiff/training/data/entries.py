"""What every layout of captioned images is read into: names, captions, and where the bytes of an image lie."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from latentdiff.errors import DataError

WEIGHT = "weight"  # the column of a metadata file that says what each image counts
PREFERRED, REJECTED = "preferred", "rejected"  # the columns that name the two images of a pair
CAPTION_COLUMNS = ("text", "caption", "captions", "prompt", "txt")


class Origin(Protocol):
    """Where the bytes of one image lie."""

    def source(self) -> Path | bytes: ...

    def stamp(self) -> str:
        """Changes when the image does."""
        ...


@dataclass(frozen=True)
class FileOrigin:
    """An image file."""

    path: Path

    def source(self) -> Path:
        return self.path

    def stamp(self) -> str:
        stat = self.path.stat()
        return f"{stat.st_size} {stat.st_mtime_ns}"


@dataclass(frozen=True)
class MemberOrigin:
    """A member of a tar file, read without the tar library."""

    path: Path
    offset: int
    size: int

    def source(self) -> bytes:
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            return file.read(self.size)

    def stamp(self) -> str:
        return f"{self.offset} {self.size} {self.path.stat().st_mtime_ns}"


@dataclass(frozen=True)
class Entry:
    """An image with its captions, not opened yet."""

    name: str
    captions: tuple[str, ...]  # empty where the image has none
    origin: Origin
    weight: float = 1.0  # factor of its loss
    rejected: Entry | None = None  # the image of the same captions to which this one is preferred

    @property
    def images(self) -> tuple[Entry, ...]:
        """The image, and in a pair the rejected one."""
        return (self,) if self.rejected is None else (self, self.rejected)

    def stamp(self) -> str:
        """Changes when the image does, or the other one of a pair."""
        return " ".join(one.origin.stamp() for one in self.images)


@dataclass(frozen=True)
class Unusable:
    """An image that cannot be used, and why."""

    name: str
    reason: str


@dataclass
class Listing:
    """What lies at one source."""

    layout: str  # in words, for people
    entries: list[Entry]
    problems: list[Unusable] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def caption_column(columns: Iterable[str], wanted: str | None, place: str) -> str:
    """The column that holds the captions.

    Raises:
        DataError: the one that was asked for, or any that is known, is not there.
    """
    there = list(columns)
    if wanted is not None:
        if wanted in there:
            return wanted
        raise DataError(f"{place} has no column {wanted!r}; its columns are {', '.join(there)}")
    known = [name for name in CAPTION_COLUMNS if name in there]
    if not known:
        looked = ", ".join(CAPTION_COLUMNS)
        raise DataError(
            f"no captions in {place}: looked for a column {looked}, found {', '.join(there)}; name yours with --caption-column"
        )
    return known[0]


def as_weight(value: Any, place: str) -> float:
    """The weight of one image: a positive number, also as text; 1 where there is none.

    Raises:
        DataError: it is something else.
    """
    if value is None or value == "":
        return 1.0
    try:
        weight = float(value)
    except (TypeError, ValueError):
        weight = math.nan
    if isinstance(value, bool) or not 0 < weight < math.inf:
        raise DataError(f"{place}: expected a {WEIGHT!r} above 0 such as 0.5, found {str(value)[:60]!r}")
    return weight


def as_captions(value: Any, place: str) -> tuple[str, ...]:
    """Captions of one image as a tuple: text, a list of text, or nothing.

    Raises:
        DataError: it is something else.
    """
    texts = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        raise DataError(f"{place}: expected a caption as text or a list of text, found {str(value)[:60]!r}")
    return tuple(text for text in (" ".join(text.split()) for text in texts) if text)
