"""Help that lists options under headings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]

FIRST = "Options"  # the heading of those that have none
MODEL = "Files of the model"
ADAPTERS = "LoRAs and embeddings"
FILES = "Files and previews"

_HEADING: dict[click.Parameter, str] = {}


class Command(click.Command):
    """A command whose help lists each option under its heading; those without one stand first."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """As click does, but for the headings."""
        sections: dict[str, list[tuple[str, str]]] = {FIRST: []}
        for parameter in self.get_params(ctx):
            if (shown := parameter.get_help_record(ctx)) is not None:
                sections.setdefault(_HEADING.get(parameter, FIRST), []).append(shown)
        for heading, options in sections.items():
            with formatter.section(heading):
                formatter.write_dl(options)


def together(*options: Decorator) -> Decorator:
    """Several options as one decorator; help lists them in this order."""

    def add(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            command = option(command)
        return command

    return add


def under(heading: str, *options: Decorator) -> Decorator:
    """The same, under a heading of help."""

    def add(command: Callable[..., Any]) -> Callable[..., Any]:
        before = len(_options_on(command))
        command = together(*options)(command)
        _HEADING.update(dict.fromkeys(_options_on(command)[before:], heading))
        return command

    return add


def headed(heading: str, options: list[click.Option]) -> list[click.Option]:
    """Options that were made without a decorator, listed under a heading of help."""
    _HEADING.update(dict.fromkeys(options, heading))
    return options


def _options_on(command: Callable[..., Any]) -> list[click.Parameter]:
    """Those that click has attached to a function that is to become a command."""
    return getattr(command, "__click_params__", [])
