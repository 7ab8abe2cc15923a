"""What `convert` wrote into the metadata of a single file, which the original layout has no place for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from latentdiff.checkpoints.families import parts_in
from latentdiff.checkpoints.files import SAFETENSORS, TensorFile, sniff
from latentdiff.errors import CheckpointError
from latentdiff.prompts.words import Words, words_from
from latentdiff.reading.json import parse_object
from latentdiff.reading.safetensors import read_header

METADATA = "latentdiff"  # the entry
WORDS = "words"  # within it, what the model says that it knows


def stored_in(file: TensorFile) -> dict[str, Any]:
    """Configurations, tokenizers and names; empty for files of others.

    Raises:
        CheckpointError: it is damaged, or names tokenizer files outside their folder.
    """
    if METADATA not in file.metadata:
        return {}
    stored = parse_object(
        file.metadata[METADATA],
        f"the entry {METADATA} of {file.path}",
        remedy="convert it from its source again",
        finite=False,  # a scheduler's configuration may hold -Infinity
    )
    try:
        needed = (*parts_in(stored["configs"]["model_index"]), "scheduler", "model_index")
        sound = all(isinstance(stored["configs"][name], dict) for name in needed)
        sound = sound and all(
            isinstance(text, str) and Path(name).name == name
            for files in (stored["tokenizer"], stored.get("tokenizer_2", {}))
            for name, text in files.items()
        )
        sound = sound and all(_are_texts(names) for names in stored["names"].values())
        sound = sound and _are_texts(dict(enumerate(stored.get("added", []))))
    except (ValueError, KeyError, TypeError, AttributeError):
        sound = False
    if not sound:
        raise CheckpointError(f"{file.path} has damaged {METADATA} metadata; convert it from its source again")
    return stored


def words_in_file(path: Path) -> Words | None:
    """The words that a model in a single file says that it knows; None where it does not say, or is no such file.

    Raises:
        CheckpointError: it is damaged.
    """
    if sniff(path) != SAFETENSORS:
        return None
    file = TensorFile(path, {}, read_header(path).metadata)
    return stored_words(file, stored_in(file))


def stored_words(file: TensorFile, stored: Mapping[str, Any]) -> Words | None:
    """The words that a model knows, from what `stored_in` found.

    Raises:
        CheckpointError: they are damaged.
    """
    if WORDS not in stored:
        return None
    what = f"{WORDS} in the entry {METADATA} of {file.path}"
    if not isinstance(stored[WORDS], dict):
        raise CheckpointError(f"{what} must be an object; convert it from its source again")
    return words_from(stored[WORDS], what)


def _are_texts(names: Any) -> bool:
    return isinstance(names, dict) and all(isinstance(name, str) for name in names.values())
