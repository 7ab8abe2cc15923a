"""Prompt files whose lines carry options, as kohya's and AUTOMATIC1111's have them.

a cat --n blurry --w 512 --h 768 --d 7 --s 30 --l 7.5
--prompt "a cat" --negative_prompt "blurry" --steps 30 --cfg_scale 7.5 --seed 7
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from latentdiff.errors import UsageError
from latentdiff.prompts.notice import shortened

_OPTION = re.compile(r"(?:^|\s)--([A-Za-z][\w-]*)(?=\s|$)")


@dataclass(frozen=True)
class Line:
    """A prompt, and what is said of its images alone, under the names of the options of generation."""

    prompt: str
    options: tuple[tuple[str, Any], ...] = ()


_KOHYA: dict[str, tuple[str, Callable[[str], Any]]] = {
    "n": ("negative_prompt", str),
    "w": ("width", int),
    "h": ("height", int),
    "d": ("seed", int),
    "s": ("steps", int),
    "l": ("guidance_scale", float),
}
_A1111: dict[str, tuple[str, Callable[[str], Any]]] = {
    "prompt": ("prompt", str),
    "negative_prompt": ("negative_prompt", str),
    "width": ("width", int),
    "height": ("height", int),
    "seed": ("seed", int),
    "steps": ("steps", int),
    "cfg_scale": ("guidance_scale", float),
    "batch_size": ("num_images", int),
    "n_iter": ("num_images", int),
    "sampler_name": ("sampler", str),
}


def read_lines(lines: Iterable[str], sampler_titles: Mapping[str, str]) -> list[Line]:
    """Prompts of a file; blank lines and lines that begin with # are left out.

    Args:
        sampler_titles: name -> what the web UIs call it, for `--sampler_name`.

    Raises:
        UsageError: an option that is not known here, or whose value is none; the message names the line.
    """
    found = []
    for number, text in enumerate(lines, 1):
        text = text.strip()
        if not text or text.startswith("#"):
            continue
        try:
            found.append(_quoted(text, sampler_titles) if text.startswith("--") else _short(text))
        except (ValueError, UsageError) as error:
            raise UsageError(f"line {number} of the prompts, {shortened(text)}: {error}") from None
    return found


def _short(text: str) -> Line:
    """A line of kohya's."""
    marks = list(_OPTION.finditer(text))
    if not marks:
        return Line(text)
    ends = [mark.start() for mark in marks[1:]] + [len(text)]
    pairs = [(mark[1], text[mark.end() : end].strip()) for mark, end in zip(marks, ends, strict=True)]
    return Line(text[: marks[0].start()].strip(), tuple(_read(pairs, _KOHYA).items()))


def _quoted(text: str, sampler_titles: Mapping[str, str]) -> Line:
    """A line of AUTOMATIC1111's."""
    words = shlex.split(text)
    names = [word.removeprefix("--") for word in words[::2]]
    if len(words) % 2 or not all(word.startswith("--") for word in words[::2]):
        raise UsageError('expected pairs of --option and "value"')
    options = _read(list(zip(names, words[1::2], strict=True)), _A1111)
    if "prompt" not in options:
        raise UsageError("expected --prompt")
    if "sampler" in options:
        titles = {title.lower(): name for name, title in sampler_titles.items()}
        options["sampler"] = titles.get(options["sampler"].lower(), options["sampler"])
    return Line(options.pop("prompt"), tuple(options.items()))


def _read(pairs: Sequence[tuple[str, str]], known: Mapping[str, tuple[str, Callable[[str], Any]]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name not in known:
            raise UsageError(f"there is no option --{name} here; known are {', '.join(f'--{each}' for each in known)}")
        own, kind = known[name]
        try:
            found[own] = kind(value)
        except ValueError:
            raise UsageError(f"expected a number for --{name}, found {shortened(value)}") from None
    return found
