"""`latentdiff train`: a model from nothing, stage by stage."""

from __future__ import annotations

from pathlib import Path

import click

from latentdiff.cli.options import ANY_PATH
from latentdiff.cli.places import FOLDER
from latentdiff.errors import ConfigError
from latentdiff.reading.plain import open_file


@click.command()
@click.argument("config", type=ANY_PATH)
@click.option(
    "--stage", "stages", multiple=True, metavar="NAME", help="Only this stage; may be repeated.  [default: all]"
)
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Replace one value of CONFIG, for example diffusion.lr=1e-3; may be repeated.",
)
@click.option("--out", type=ANY_PATH, metavar="FOLDER", help="Folder of the run, in place of `run` in CONFIG.")
@click.option(
    "--export", type=ANY_PATH, callback=FOLDER, metavar="FOLDER", help="Train nothing; write the model as far as it is trained."
)
def train(
    config: Path, stages: tuple[str, ...], overrides: tuple[str, ...], out: Path | None, export: Path | None
) -> None:
    """Train a model from nothing as CONFIG says.

    A run that was stopped goes on where it stood: give the same command again.
    """
    open_file(config, ConfigError).close()
    from latentdiff.training.stages.config import load_config

    settings = load_config(config, [*overrides, *([f"run={out}"] if out else [])])
    from latentdiff.training.stages.train import STAGES
    from latentdiff.training.stages.train import export as export_model
    from latentdiff.training.stages.train import train as train_stages

    if export:
        click.echo(export_model(settings, export))
    elif model := train_stages(settings, stages or STAGES):
        click.echo(model)
