"""`latentdiff report`: how is a training going?"""

from __future__ import annotations

from pathlib import Path

import click

from latentdiff.errors import DataError


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
def report(run: Path) -> None:
    """Write RUN/report.html: curves, samples by step, copies, settings, and which step is the best.

    A training writes it at its end; this does it at any time, also while it runs. The file needs no network and no
    scripts.
    """
    if not run.exists():
        raise DataError(f"expected the folder of a training run, found nothing at {run}")
    from latentdiff.training.report.page import write_report

    click.echo(write_report(run))
