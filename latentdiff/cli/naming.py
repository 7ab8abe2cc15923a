"""The names of options in errors: the library's messages have those of Python, a shell's user knows the flags."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, MutableMapping
from importlib import import_module
from keyword import iskeyword
from typing import Any

import click

from latentdiff.errors import UsageError
from latentdiff.request.task_options import NAMES

_QUOTED = re.compile(r"""((?<![^\s(=:,])'[^']*'|"[^"]*")""")  # what users wrote, and no genitives
# Names that are plain words too are options where a message speaks of options.
_SPEAKS = r"^|\bexpected (?:a |the |either |no )?|\b(?:with|leave|drop|found|either|or|and|no) "


class Commands(click.Group):
    """Commands whose wrong usage is told in the words of their flags."""

    def invoke(self, ctx: click.Context) -> Any:
        """As click does."""
        try:
            return super().invoke(ctx)
        except UsageError as error:
            command = self.commands.get(ctx.invoked_subcommand or "")
            raise UsageError(with_flags(str(error), flags_of(command))) from error if command else None


class Imported(MutableMapping[str, click.Command]):
    """Commands by their names, each imported when it is asked for.

    Args:
        files: the modules of `latentdiff.cli`, by the names of the commands.
    """

    def __init__(self, files: Mapping[str, str]) -> None:
        self._commands: dict[str, click.Command | str] = dict(files)

    def __getitem__(self, name: str) -> click.Command:
        found = self._commands[name]
        if isinstance(found, click.Command):
            return found
        return getattr(import_module(f"latentdiff.cli.{found}"), f"{name}_" if iskeyword(name) else name)

    def __setitem__(self, name: str, command: click.Command) -> None:
        self._commands[name] = command

    def __delitem__(self, name: str) -> None:
        del self._commands[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._commands)

    def __len__(self) -> int:
        return len(self._commands)


def flags_of(command: click.Command | None) -> dict[str, str]:
    """The flags of a command's options by their names in Python."""
    options = command.params if command else []
    return {str(one.name): one.opts[-1] for one in options if isinstance(one, click.Option)}


def with_flags(message: str, flags: Mapping[str, str]) -> str:
    """A message in which options are called by their flags; what is quoted stays."""
    plain = [name for name in flags if "_" not in name and name in NAMES]
    joined = [name for name in flags if "_" in name]
    for names, before in ((joined, r"(?<![\w./=-])"), (plain, f"(?P<before>{_SPEAKS})")):
        if names:
            pattern = re.compile(rf"{before}(?P<name>{'|'.join(map(re.escape, names))})(?![\w=/.-]|:\w)")
            parts = _QUOTED.split(message)
            parts[::2] = [pattern.sub(lambda found: _renamed(found, flags), part) for part in parts[::2]]
            message = "".join(parts)
    return message


def _renamed(found: re.Match[str], flags: Mapping[str, str]) -> str:
    return found.groupdict().get("before", "") + flags[found["name"]]
