"""`latentdiff evaluate`: how well the images show what the prompts say."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import click

from latentdiff.cli.loras import LORAS
from latentdiff.cli.options import ANY_PATH, DEVICE, MODEL
from latentdiff.cli.output import check_writable
from latentdiff.cli.places import FOLDER, folder_there, model_there
from latentdiff.request.options import SamplerName


@click.command()
@MODEL
@LORAS
@click.option(
    "--compare",
    callback=model_there,
    metavar="FOLDER|HUB_ID|FILE",
    help="Score another model with the same prompts and seeds, and tell by how much the two differ.",
)
@click.option(
    "--out",
    type=ANY_PATH,
    callback=FOLDER,
    default="evaluation",
    show_default=True,
    metavar="FOLDER",
    help="For scores and images.",
)
@click.option("--limit", type=click.IntRange(1), metavar="N", help="Prompts of each task.  [default: all]")
@click.option(
    "--seeds", type=click.IntRange(1), default=4, show_default=True, metavar="N", help="Images of each prompt."
)
@click.option("--steps", type=int, default=25, show_default=True, metavar="N", help="Denoising steps, 1 to 1000.")
@click.option("--guidance", type=float, metavar="X", help="1 is no guidance.  [default: the model's]")
@click.option("--sampler", type=click.Choice(get_args(SamplerName)), default="ddim", show_default=True)
@click.option(
    "--scenes",
    type=ANY_PATH,
    callback=folder_there("scenes"),
    metavar="FOLDER",
    help="Real scenes made by tools/make_scenes.py, for the judge's ceiling and floor and the VAE's scores.",
)
@DEVICE
def evaluate(out: Path, **settings: Any) -> None:
    """Score a model on GenEval's six tasks, on scenes.

    Images of held-out prompts are judged by a classifier that shares no weights with the model: single object, two
    objects, counting, colours, position, colour attribution.
    """
    check_writable(out)
    from latentdiff import evaluation

    click.echo(evaluation.evaluate(out=out, **settings))
