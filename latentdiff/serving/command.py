"""The command line that makes the same images as a request of the page."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator, Mapping
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


def control_flags(image: Path, model: Path, prepare: str | None, mode: str | None, *when: float) -> list[str]:
    """The flags of a ControlNet and the image that it follows; `when` is its scale, start and end."""
    kind, of_union = (f"{name}=" if name else "" for name in (prepare, mode))
    return ["--control", f"{kind}{image}", "--control-model", f"{of_union}{model}{_numbers(*when)}"]


def image_prompt_flags(image: Path, adapter: Path, *when: float) -> list[str]:
    """The flags of an IP-Adapter and the image that it sees; `when` is its scale, start and end."""
    return ["--image-prompt", f"{image}{_numbers(*when)}", "--ip-adapter", str(adapter)]


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
    steering: Iterable[str] = (),
) -> str:
    """A line for a shell.

    Args:
        fields: "prompt", options of generation and of the task by their names.
        files: flag -> what belongs behind it: a model, a folder.
        image, mask: files to begin from.
        steering: the flags of what ControlNets follow and IP-Adapters see.
    """
    command = "generate" if image is None else "edit" if mask is None else "inpaint"
    given = [*([] if image is None else [str(image)]), fields["prompt"]]
    flags = [*([] if mask is None else ["--mask", str(mask)]), *flags_of(fields), *steering]
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
