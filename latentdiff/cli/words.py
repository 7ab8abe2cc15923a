"""`latentdiff words`: what a small model knows, and what commands say of prompts beyond that."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from latentdiff.checkpoints.embedded import embedded_model
from latentdiff.cli.options import MODEL
from latentdiff.errors import UsageError, printable
from latentdiff.prompts.syntax import said
from latentdiff.prompts.words import KINDS, Words, read_words
from latentdiff.request.options import OPTIONS


@click.command()
@MODEL
def words(model: str | None) -> None:
    """List the words that a model knows: things, colours, backgrounds, sizes, counts and relations.

    Models that latentdiff trained say so; the embedded one is taken without --model.
    """
    known = words_of(model)
    if known is None:
        raise UsageError(f"{model} does not say which words it knows; only small models that latentdiff trained do")
    for kind in KINDS:
        text = f"{kind}: {', '.join(known.kinds[kind])}"
        click.echo(textwrap.fill(printable(text), 100, subsequent_indent="  ", break_on_hyphens=False))


def words_of(model: str | None) -> Words | None:
    """The words of the model that --model names, None where it does not say."""
    place = Path(model).expanduser() if model else embedded_model()
    if not place.is_file():
        return read_words(place)
    from latentdiff.checkpoints.stored import words_in_file

    return words_in_file(place)


def remark(settings: Mapping[str, Any], prompts: Sequence[str]) -> None:
    """Say on stderr, in a line each, how a request goes beyond what the model was trained on.

    Nothing is said of a model with LoRAs, which bring words of their own.

    Args:
        settings: of a command, before `loaded_model` takes the model's out of them.
    """
    known = None if settings["loras"] or settings["embeddings"] else words_of(settings["model"])
    if known is None:
        return
    texts = [said(prompt, settings.get("prompt_syntax") or OPTIONS["prompt_syntax"].default) for prompt in prompts if prompt]
    for line in known.remarks(texts, settings.get("width"), settings.get("height")):
        click.echo(f"note: {printable(line)}", err=True)
