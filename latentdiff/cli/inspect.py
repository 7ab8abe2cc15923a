"""`latentdiff inspect`: what is this file?"""

from __future__ import annotations

import click


@click.command()
@click.argument("source", metavar="FILE|FOLDER|HUB_ID")
def inspect(source: str) -> None:
    """Say what a model file is: family, size, number format, prediction type, hash. Executes nothing in it."""
    from latentdiff import checkpoints

    click.echo(checkpoints.inspect(source))
