"""`latentdiff convert`: between the diffusers folder and the original single file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from latentdiff.cli.options import ANY_PATH, EMA, PARTS_FROM, PREDICTION_TYPE, ZERO_SNR
from latentdiff.cli.output import check_writable
from latentdiff.cli.places import written
from latentdiff.errors import UsageError
from latentdiff.files import check_named


@click.command()
@click.argument("source", metavar="IN")
@click.argument("target", metavar="OUT", type=ANY_PATH, callback=written(".safetensors", folder=True))
@EMA
@PREDICTION_TYPE
@ZERO_SNR
@PARTS_FROM
def convert(source: str, target: Path, **choices: Any) -> None:
    """Convert the model IN to OUT, loss-free: a name ending in .safetensors is a single file, others a folder."""
    check_named(source)
    check_writable(target.parent if target.suffix.lower() == ".safetensors" else target)
    if target.suffix.lower() == ".safetensors" and target.is_dir():
        raise UsageError(f"cannot write {target}: it is a folder")
    from latentdiff.checkpoints.conversion import convert as convert_model

    for note in convert_model(source, target, **choices):
        click.echo(f"note: {note}", err=True)
    click.echo(target)
