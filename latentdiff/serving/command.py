"""The command line that makes the same images as a request of the page."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

from latentdiff.request.option import flag_of
from latentdiff.request.options import OPTIONS
from latentdiff.serving.asked import OTHERWISE

# Of the tasks; what is True stands alone.
TASK = {name: flag_of(name) for name in
        ("strength", "grow", "blur", "padding", "repeats", "only_masked", "remove")}  # fmt: skip
_ASKED = ("negative_prompt", "seed", "num_images", "width", "height")


@dataclass(frozen=True)
class NamedControl:
    """A ControlNet and the image that it follows, as files; see `ControlNet.__call__`."""

    image: Path
    prepare: str | None
    model: Path
    scale: float
    start: float
    end: float
    mode: str | None

    @property
    def flags(self) -> tuple[str, ...]:
        """As the command line takes them."""
        kind = f"{self.prepare}=" if self.prepare else ""
        mode = f"{self.mode}=" if self.mode else ""
        model = f"{mode}{self.model}{_numbers(self.scale, self.start, self.end)}"
        return "--control", f"{kind}{self.image}", "--control-model", model


@dataclass(frozen=True)
class NamedImagePrompt:
    """An IP-Adapter and the image that it sees, as files; see `IPAdapter.__call__`."""

    image: Path
    adapter: Path
    scale: float
    start: float
    end: float

    @property
    def flags(self) -> tuple[str, ...]:
        """As the command line takes them."""
        image = f"{self.image}{_numbers(self.scale, self.start, self.end)}"
        return "--image-prompt", image, "--ip-adapter", str(self.adapter)


def _numbers(scale: float, start: float, end: float) -> str:
    """What stands behind a file, as far as it is not the default."""
    share = "" if (start, end) == (0.0, 1.0) else f"@{_plain(start)}-{_plain(end)}"
    return f"{'' if scale == 1.0 else f':{_plain(scale)}'}{share}"


def _plain(number: float) -> str:
    """The number without an exponent, exactly."""
    return format(Decimal(repr(number)), "f")


def command_line(
    fields: Mapping[str, Any],
    files: Mapping[str, Path],
    *,
    image: Path | None = None,
    mask: Path | None = None,
    steering: Sequence[NamedControl | NamedImagePrompt] = (),
    guess: bool = False,
) -> str:
    """A line for a shell.

    Args:
        fields: "prompt", options of generation and of the task by their names.
        files: flag -> what belongs behind it: a model, a folder.
        image, mask: files to begin from.
        steering: what ControlNets follow and IP-Adapters see.
        guess: let the controls act on the prompt alone.
    """
    command = "generate" if image is None else "edit" if mask is None else "inpaint"
    given = [*([] if image is None else [str(image)]), fields["prompt"]]
    flags = [*([] if mask is None else ["--mask", str(mask)]), *flags_of(fields)]
    flags += [word for one in steering for word in one.flags]
    flags += ["--control-guess"] * (guess and any(isinstance(one, NamedControl) for one in steering))
    flags += [word for flag, path in files.items() for word in (flag, str(path))]
    is_plain = not any(word.startswith("-") for word in given)
    return shlex.join(["latentdiff", command, *given, *flags] if is_plain else
                      ["latentdiff", command, *flags, "--", *given])  # fmt: skip


def flags_of(fields: Mapping[str, Any]) -> Iterator[str]:
    """The flags of what is given and is not the default."""
    for name, value in fields.items():
        option = OPTIONS.get(name)
        if value is None or (name in OTHERWISE and name not in _ASKED) or (option and value == option.default):
            continue
        if option:
            flag = option.flag(name)
        elif name in TASK and value is not False:
            flag = TASK[name]
        else:
            continue
        yield flag
        if isinstance(value, list | tuple):
            yield from [",".join(map(str, value))] if name in ("sigmas", "timesteps") else map(str, value)
        elif value is not True:
            yield str(value)
