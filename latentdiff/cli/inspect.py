"""`latentdiff inspect`: what is this file?"""

from __future__ import annotations

import click


@click.command()
@click.argument("source", metavar="FILE|FOLDER|HUB_ID")
@click.option("--json", "as_json", is_flag=True, help="Print it as a JSON object, for programs.")
def inspect(source: str, as_json: bool) -> None:
    """Say what a model file is: family, size, number format, prediction type, hash. Executes nothing in it."""
    from latentdiff.checkpoints.inspection import inspect as inspect_model

    report = inspect_model(source)
    click.echo(report.to_json() if as_json else report)
