"""A hook of mkdocs: puts every option of generation, from where it stands in the code, into docs/options.md, and takes
away links that lead out of docs/ into the repository."""

from __future__ import annotations

import re
from typing import Any

from latentdiff.request.option import Option
from latentdiff.request.option_texts import texts
from latentdiff.request.options import (
    OPTIONS,
    GenerateOptions,
    SamplingOptions,
    SeededOptions,
    SizedOptions,
    WalkOptions,
    options_of,
)

MARK = "<!-- tables -->"
MOST_USED = "Most used"
# The smallest group that an option is in says who takes it.
TAKEN_BY = {
    WalkOptions: "all that follow a prompt, also `translate` and `restore`",
    SeededOptions: "all that draw noise, also `restore`",
    SamplingOptions: "`pipe`, `image_to_image`, `inpaint`, `interpolate`",
    SizedOptions: "`pipe`, tasks that make images of a chosen size",
    GenerateOptions: "`pipe` alone",
}


def on_page_markdown(markdown: str, **context: Any) -> str:
    """What mkdocs calls for every page."""
    inside = re.sub(r"\[([^\]]+)\]\(\.\./[^)]*\)", r"\1", markdown)
    return inside.replace(MARK, tables()) if MARK in inside else inside


def tables() -> str:
    """A table of the options under each heading, as in the help of the command line."""
    rows: dict[str, list[str]] = {}
    for name, option in OPTIONS.items():
        taken_by = next(who for group, who in TAKEN_BY.items() if name in options_of(group))
        rows.setdefault(option.heading or MOST_USED, []).append(row(name, option, taken_by))
    head = ["| option | command line | default | | taken by |", "|---|---|---|---|---|"]
    found = {MOST_USED: rows.pop(MOST_USED), **rows}
    return "\n".join("\n".join([f"## {heading}", "", *head, *table]) + "\n" for heading, table in found.items())


def row(name: str, option: Option, taken_by: str) -> str:
    """The line of one option."""
    flags = [] if option.flags == () else [option.flag(name)]
    default = option.unset or ("" if option.default is None else repr(option.default))
    if option.fast is not None:
        default += f", fast {option.fast!r}"
    cells = (f"`{name}`", " ".join(f"`{flag}`" for flag in flags), default, texts()[name], taken_by)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
