"""`latentdiff inspect`: what is this file?"""

from __future__ import annotations

import click

from latentdiff.files import check_named


@click.command()
@click.argument("source", metavar="FILE|FOLDER|HUB_ID")
@click.option("--json", "as_json", is_flag=True, help="Print it as a JSON object, for programs.")
def inspect(source: str, as_json: bool) -> int:
    """Say what a model file is: family, size, number format, prediction type, hash. Executes nothing in it.

    The exit code is 1 if there is a problem with it.
    """
    check_named(source)
    from latentdiff.checkpoints.inspection import inspect as inspect_model

    report = inspect_model(source)
    click.echo(report.to_json() if as_json else report)
    return 1 if report.problem else 0
