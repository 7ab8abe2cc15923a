"""A hook of mkdocs: puts every option of generation, from where it stands in the code, into docs/options.md, and takes
away links that lead out of docs/ into the repository."""

from __future__ import annotations

import re
from typing import Any

from latentdiff.request.option import Option
from latentdiff.request.option_texts import texts
from latentdiff.request.options import (
    GenerateOptions,
    SamplingOptions,
    SeededOptions,
    SizedOptions,
    WalkOptions,
    options_of,
)

MARK = "<!-- tables -->"
GROUPS = {
    WalkOptions: "Taken by everything that follows a prompt: also by `translate` and `restore`.",
    SeededOptions: "Taken by everything that draws noise: also by `restore`.",
    SamplingOptions: "Taken by the pipeline, `image_to_image`, `inpaint` and `interpolate`.",
    SizedOptions: "Taken by the pipeline and, as options of their own, by tasks that make images of a chosen size.",
    GenerateOptions: "Taken by the pipeline alone.",
}


def on_page_markdown(markdown: str, **context: Any) -> str:
    """What mkdocs calls for every page."""
    inside = re.sub(r"\[([^\]]+)\]\(\.\./[^)]*\)", r"\1", markdown)
    return inside.replace(MARK, tables()) if MARK in inside else inside


def tables() -> str:
    """A table of each group of options, under its heading."""
    parts: list[str] = []
    seen: set[str] = set()
    for group, title in GROUPS.items():
        rows = [row(name, option) for name, option in options_of(group).items() if name not in seen]
        seen |= options_of(group).keys()
        table = ["| option | command line | default | |", "|---|---|---|---|", *rows]
        parts.append("\n".join([f"## {group.__name__}", "", title, "", *table]) + "\n")
    return "\n".join(parts)


def row(name: str, option: Option) -> str:
    """The line of one option."""
    flags = [] if option.flags == () else [option.flag(name)]
    default = option.unset or ("" if option.default is None else repr(option.default))
    if option.fast is not None:
        default += f", fast {option.fast!r}"
    cells = (f"`{name}`", " ".join(f"`{flag}`" for flag in flags), default, texts()[name])
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
