"""The words of a training set, which travel with the model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from latentdiff.prompts.words import Words, split_words
from latentdiff.training.data import Dataset
from latentdiff.training.stages.scenes import find_scenes

_COUNTS = ("one", "two", "three", "four")
_SIZES = ("small", "big")


def words_of(captions: Iterable[str], scenes: Sequence[Mapping[str, Any]], size: int) -> Words:
    """The words of captions, and by their kind those of the scenes behind them.

    Args:
        captions: what was trained on.
        scenes: each with `background`, `relation`, and `objects` with `noun`, `colour` and perhaps `size`.
        size: side of the images in pixels.
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


def words_of_data(data: Dataset, size: int) -> Words | None:
    """The words of a training set; None where the metadata has no scenes."""
    scenes = find_scenes(data)
    if not all(scenes):
        return None
    captions = (caption for of_image in data.captions for caption in of_image)
    return words_of(captions, [scene for scene in scenes if scene], size)


def _sorted(found: Iterable[str | None]) -> tuple[str, ...]:
    return tuple(sorted({entry for entry in found if entry}))
