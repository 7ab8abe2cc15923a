"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path

import click

from latentdiff.names import PRECISIONS

ANY_PATH = click.Path(path_type=Path)
MODEL = click.option("--model", metavar="FOLDER|HUB_ID|FILE", help="The model; without it, the one that comes with latentdiff.")
DEVICE = click.option("--device", default="auto", show_default=True, metavar="NAME", help="auto, cpu, cuda, cuda:N or mps.")
PRECISION = click.option(
    "--precision",
    type=click.Choice(PRECISIONS),
    default="auto",
    show_default=True,
    help="Number format; auto is the fastest one that keeps the picture.",
)
