"""The grammar of the text that AUTOMATIC1111's web UI and its kin put into images: prompt, negative prompt, settings.

    a castle
    Negative prompt: fog
    Steps: 20, Sampler: Euler a, CFG scale: 7, Seed: 1, Size: 512x512, Model: "a, b"

The last line is one of settings if it has at least three; extensions may leave lines of their own behind it. A value
with a comma, a colon or a line break is a JSON string. Everything takes time in proportion to the text's length.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import NoneType
from typing import Any, cast, get_args, get_origin

from latentdiff.errors import DataError
from latentdiff.reading.json import is_unicode, parse_json

NEGATIVE = "Negative prompt:"
FEWEST_SETTINGS = 3
_KEY = re.compile(r"\w[\w \-/]+$")  # at the end of what stands before a colon
_LONGEST_KEY = 64
_QUOTED = re.compile(r'"(?:\\.|[^\\"])*"')
_BEHIND = re.compile(r"\s*(\w[\w \-/]{1,63}):\s*(.*)")


@dataclass(frozen=True)
class InfoText:
    """A text by its parts; `settings` and what stands `behind` them in the order of the text."""

    prompt: str
    negative: str
    settings: dict[str, str]
    behind: dict[str, str]


def split(text: str) -> InfoText:
    """Take a text apart; one without a line of settings has no settings.

    As its authors' programs do, a line of the prompt that begins with "Negative prompt:" begins the negative prompt.

    Raises:
        DataError: the text holds lone surrogates.
    """
    if not is_unicode(text):
        raise DataError("the image's parameters text holds half of a character, a lone surrogate")
    lines = text.strip().split("\n")
    last = len(lines) - 1
    settings = read_settings(lines[last])
    if "Steps" not in settings:  # an extension's line, or words of a prompt
        places = [i for i, line in enumerate(lines) if line.startswith("Steps: ")]
        last = places[-1] if places else last
        settings = read_settings(lines[last])
    if len(settings) < FEWEST_SETTINGS:
        last, settings = len(lines), {}
    told, behind = lines[:last], dict[str, str]()
    for line in lines[last + 1 :]:
        key = _BEHIND.match(line)
        if key:
            behind[key[1]] = key[2]
        elif behind:
            behind[next(reversed(behind))] += f"\n{line}"
        else:
            behind[""] = line
    start = next((i for i, line in enumerate(told) if line.startswith(NEGATIVE)), len(told))
    negative = "\n".join(told[start:]).removeprefix(NEGATIVE).strip()
    return InfoText("\n".join(told[:start]).strip(), negative, settings, behind)


def joined(prompt: str, negative: str, settings: Mapping[str, str]) -> str:
    """The text of these parts."""
    lines = [prompt, *([f"{NEGATIVE} {negative}"] if negative else [])]
    return "\n".join([*lines, ", ".join(f"{key}: {_quote(value)}" for key, value in settings.items())])


def read_settings(line: str) -> dict[str, str]:
    """ "Key: value, Key: value"; text that is neither a key nor a value is passed over."""
    found: dict[str, str] = {}
    place = 0
    while (colon := line.find(":", place)) >= 0:
        before = line[max(place, colon - _LONGEST_KEY) : colon]
        key = _KEY.search(before[before.rfind(",") + 1 :])
        if not key:
            place = colon + 1
            continue
        start = colon + 1
        start += len(line[start : start + _LONGEST_KEY]) - len(line[start : start + _LONGEST_KEY].lstrip())
        quoted = _QUOTED.match(line, start) if line.startswith('"', start) else None
        if quoted and line[quoted.end() : quoted.end() + 1] in ("", ","):
            end = quoted.end()
        else:
            end = next((comma for comma in (line.find(",", start),) if comma >= 0), len(line))
        found[key[0]] = _unquote(line[start:end])
        place = end
    return found


def _quote(value: str) -> str:
    is_plain = value == value.strip() and not re.search(r'[,:\n"]', value)
    return value if is_plain else json.dumps(value, ensure_ascii=False)


def _unquote(value: str) -> str:
    try:
        return str(parse_json(value, "a setting", DataError)) if value.startswith('"') else value.strip()
    except DataError:
        return value


def written_value(value: Any) -> str:
    """A value as the text of the web UIs has it."""
    return " to ".join(map(str, cast(tuple[float, ...], value))) if isinstance(value, tuple) else str(value)


def read_value(kind: Any, text: str) -> Any:
    """What `written_value` wrote of a value of this type, which may be None.

    Raises:
        ValueError: it is not a value of this type.
    """
    kind = next(kind for kind in (get_args(kind) or (kind,)) if kind is not NoneType)
    if get_origin(kind) is tuple:
        return tuple(part(end) for part, end in zip(get_args(kind), text.split(" to "), strict=True))
    return kind(text)
