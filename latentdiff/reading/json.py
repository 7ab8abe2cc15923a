"""JSON from anywhere: bounded in size, depth and length of numbers, and in text that can be written again."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from typing import Any, NoReturn

from latentdiff.errors import CheckpointError, LatentDiffError
from latentdiff.reading.plain import read_text

DEEPEST = 64  # levels; the files of published models have 5
_AS_NOUGHTS = bytes.maketrans(b"123456789", b"0" * 9)
_LONG_NUMBER = b"0" * 19
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_TOO_LARGE = "it holds a number beyond 64 bits"
_LARGEST = 2**63
_NESTED = (dict, list)


def parse_json(
    text: str,
    place: str,
    error: type[LatentDiffError] = CheckpointError,
    *,
    remedy: str = "download it again",
    finite: bool = True,
) -> Any:
    """The value of a JSON text.

    Args:
        place: where the text comes from, for messages.
        error: what is raised.
        remedy: what to do, the end of the message.
        finite: whether NaN and Infinity, which Python writes and JSON does not know, are refused.

    Raises:
        error: it is no JSON, nested too deeply, or holds a number or a text that nothing can use.
    """

    def refuse(reason: object) -> NoReturn:
        raise error(f"{place} is not valid JSON ({reason}); {remedy}")

    try:
        hooks = {"parse_constant": _no_constant, "parse_float": _finite} if finite else {}
        value = json.loads(text, **hooks)
    except RecursionError:
        refuse(f"it is nested more than {DEEPEST} levels deep")
    except (ValueError, TypeError) as cause:  # a number of more than 4,300 digits is a ValueError too
        refuse(cause)
    # Looking at every value takes longer than reading them: only where the text gives cause.
    if text.count("{") + text.count("[") > DEEPEST and _is_deep(value):
        refuse(f"it is nested more than {DEEPEST} levels deep")
    if _LONG_NUMBER in text.encode(errors="replace").translate(_AS_NOUGHTS) and any(map(_is_huge, _leaves(value))):
        refuse(_TOO_LARGE)
    has_surrogates = ("\\ud" in text or "\\uD" in text) and _SURROGATE.search(text)
    if has_surrogates and any(isinstance(leaf, str) and not is_unicode(leaf) for leaf in _leaves(value)):
        refuse("it holds half of a character, a lone surrogate")
    return value


def parse_object(
    text: str,
    place: str,
    error: type[LatentDiffError] = CheckpointError,
    *,
    remedy: str = "download it again",
    finite: bool = True,
) -> dict[str, Any]:
    """The same of a text that must hold an object."""
    value = parse_json(text, place, error, remedy=remedy, finite=finite)
    if not isinstance(value, dict):
        raise error(f"{place} must hold a JSON object, found a {type(value).__name__}; {remedy}")
    return value


def read_object(
    path: str | os.PathLike[str],
    error: type[LatentDiffError] = CheckpointError,
    *,
    remedy: str = "download it again",
    finite: bool = True,
) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        error: the file cannot be read, or is not valid.
    """
    text = read_text(path, error, remedy=remedy)
    return parse_object(text, os.fspath(path), error, remedy=remedy, finite=finite)


def is_unicode(text: str) -> bool:
    """Whether a text can be written as UTF-8: it holds no lone surrogate."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def _finite(text: str) -> float:
    value = float(text)
    if abs(value) == float("inf"):
        raise ValueError(_TOO_LARGE)
    return value


def _is_huge(value: Any) -> bool:
    return isinstance(value, int) and not -_LARGEST <= value < 2 * _LARGEST


def _is_deep(value: Any) -> bool:
    level = [value]
    for _ in range(DEEPEST):
        level = [part for whole in level for part in _parts(whole) if type(part) in _NESTED]
        if not level:
            return False
    return True


def _leaves(value: Any) -> Iterator[Any]:
    level = [value]
    while level:
        yield from (leaf for leaf in level if not isinstance(leaf, (dict, list)))
        yield from (key for whole in level if isinstance(whole, dict) for key in whole)
        level = [part for whole in level for part in _parts(whole)]


def _parts(value: Any) -> Any:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
