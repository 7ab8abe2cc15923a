"""`latentdiff train`: a model from nothing, stage by stage."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from latentdiff.cli.options import ANY_PATH

if TYPE_CHECKING:
    from latentdiff.training.config import TrainingConfig

PREVIEW_PICTURES = 16


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
    "--export", type=ANY_PATH, metavar="FOLDER", help="Train nothing; write the model as far as it is trained."
)
def train(
    config: Path, stages: tuple[str, ...], overrides: tuple[str, ...], out: Path | None, export: Path | None
) -> None:
    """Train a model from nothing as CONFIG says.

    A run that was stopped goes on where it stood: give the same command again.
    """
    from latentdiff.training.config import load_config
    from latentdiff.training.run import STAGES
    from latentdiff.training.run import export as export_model
    from latentdiff.training.run import train as train_stages

    settings = load_config(config, [*overrides, *([f"run={out}"] if out else [])])
    if export:
        click.echo(export_model(settings, export))
    elif model := train_stages(settings, stages or STAGES, _preview(settings)):
        click.echo(model)


def _preview(settings: TrainingConfig) -> Callable[[Any, Path], None]:
    """Previews of a run: the first held-out captions, drawn by the pipeline that `generate` uses."""
    from latentdiff.image import contact_sheet, save_png
    from latentdiff.pipeline import Pipeline
    from latentdiff.training.captioned_folder import read_folder

    prompts = read_folder(settings.data.validation, limit=PREVIEW_PICTURES).captions

    def write(components: Any, path: Path) -> None:
        parts = (components.text_encoder, components.unet, components.vae)
        modes = [part.training for part in parts]
        images = Pipeline.from_components(components)(list(prompts), seed=settings.seed, progress=False)
        for part, mode in zip(parts, modes, strict=True):
            part.train(mode)
        save_png(contact_sheet(images, prompts), path)

    return write
