"""The words of a training set, for the file that travels with a model."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from latentdiff.files import atomic_path
from latentdiff.prompts.words import FILE, Words, as_json, split_words
from latentdiff.reading.json import parse_object
from latentdiff.training.captioned_folder import METADATA, CaptionedFolder

_COUNTS = ("one", "two", "three", "four")
_SIZES = ("small", "big")


def words_of(captions: Iterable[str], scenes: Sequence[Mapping[str, Any]], size: int) -> Words:
    """The words of captions, and by their kind those of the scenes behind them.

    Args:
        captions: what was trained on.
        scenes: each with `background`, `relation`, and `objects` with `noun`, `colour` and perhaps `size`.
        size: side of the pictures in pixels.
    """
    words = frozenset(word for caption in captions for word in split_words(caption))
    things = [thing for scene in scenes for thing in scene["objects"]]
    most = max((sum(a["noun"] == b["noun"] for a in s["objects"]) for s in scenes for b in s["objects"][:1]), default=0)
    kinds = {
        "things": _sorted(thing["noun"] for thing in things),
        "colours": _sorted(thing["colour"] for thing in things),
        "backgrounds": _sorted(scene["background"] for scene in scenes),
        "sizes": tuple(size for size in _SIZES if size in words),
        "counts": _COUNTS[:most],
        "relations": _sorted(scene["relation"] for scene in scenes),
    }
    return Words(kinds, words, size)


def write_words(data: CaptionedFolder, size: int, folder: Path) -> None:
    """Write the words of a training set into a model's folder; nothing where the metadata has no scenes."""
    path = data.folder / METADATA
    if not path.is_file():
        return
    lines = path.read_text(encoding="utf-8").splitlines()
    scenes = [parse_object(line, str(path)).get("scene") for line in lines if line.strip()]
    if not all(scenes):
        return
    write(words_of(data.captions, scenes, size), folder)


def write(words: Words, folder: Path) -> None:
    """Write the file of words of a model's folder."""
    with atomic_path(folder / FILE) as temporary:
        temporary.write_text(json.dumps(as_json(words), indent=1) + "\n", encoding="utf-8")


def _sorted(found: Iterable[str | None]) -> tuple[str, ...]:
    return tuple(sorted({entry for entry in found if entry}))
