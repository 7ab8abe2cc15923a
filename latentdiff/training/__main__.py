"""`python -m latentdiff.training CONFIG`: what `latentdiff train` calls, without the previews that need the
pipeline."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from latentdiff.errors import LatentDiffError
from latentdiff.training.config import load_config
from latentdiff.training.run import STAGES, export, train


@click.command()
@click.argument("config")
@click.option("--stage", "stages", multiple=True, type=click.Choice(STAGES), help="Only this stage (repeatable).")
@click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Replace one value, e.g. diffusion.lr=1e-3."
)
@click.option("--export", "folder", metavar="FOLDER", help="Train nothing; write the model as far as it is trained.")
def main(config: str, stages: tuple[str, ...], overrides: tuple[str, ...], folder: str | None) -> None:
    """Train a model from nothing as CONFIG says, going on where an earlier call stopped."""
    try:
        settings = load_config(Path(config), overrides)
        if folder:
            export(settings, Path(folder))
        else:
            train(settings, stages or STAGES)
    except LatentDiffError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
