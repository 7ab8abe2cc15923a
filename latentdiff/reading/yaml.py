"""YAML from anywhere: no tags, no aliases that grow, bounded in size and depth."""

from __future__ import annotations

import os
from typing import Any

from latentdiff.errors import ConfigError, LatentDiffError
from latentdiff.reading.plain import read_text

LONGEST = 256 * 1024  # bytes; the reader of the yaml library takes a second for so many
_DEEPEST = 32
_MOST = 100_000  # values, those that aliases repeat counted each time


def parse_yaml(text: str, place: str, error: type[LatentDiffError] = ConfigError) -> Any:
    """The value of a YAML text.

    Raises:
        error: it is no YAML, too long, nested too deeply, or repeats itself without end by aliases.
    """
    import yaml

    if len(text) > LONGEST:
        raise error(
            f"{place} is too large: expected at most {LONGEST // 1024} KiB of YAML; it is probably another file"
        )
    try:
        value = yaml.safe_load(text)
    # A date that does not exist is a ValueError, a list as a key a TypeError.
    except (yaml.YAMLError, ValueError, TypeError, RecursionError, OverflowError, LookupError, AttributeError) as cause:
        reason = "it is nested too deeply" if isinstance(cause, RecursionError) else " ".join(str(cause).split())
        raise error(f"{place} is not valid YAML: {reason}") from cause
    if _size(value, 0, {}) > _MOST:
        raise error(f"{place} is not valid YAML: it holds more than {_MOST:,} values or {_DEEPEST} levels")
    return value


def read_yaml(path: str | os.PathLike[str], error: type[LatentDiffError] = ConfigError) -> Any:
    """The value of a YAML file.

    Raises:
        error: it cannot be read, or is not valid.
    """
    return parse_yaml(read_text(path, error, LONGEST), os.fspath(path), error)


def _size(value: Any, depth: int, known: dict[int, int]) -> int:
    """How many values there are; too many if they are nested too deeply, as what contains itself is."""
    if not isinstance(value, (dict, list, set, tuple)):
        return 1
    if id(value) in known:
        return known[id(value)]
    if depth >= _DEEPEST:
        return _MOST + 1
    parts = list(value.values()) if isinstance(value, dict) else list(value)
    known[id(value)] = _MOST + 1  # until it is counted: one that contains itself has no end
    known[id(value)] = 1 + sum(_size(part, depth + 1, known) for part in parts)
    return known[id(value)]
