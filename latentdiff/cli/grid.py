"""`latentdiff grid`: one prompt under all combinations of some settings, on one sheet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from latentdiff.cli import output
from latentdiff.cli.controls import STEERING_OPTIONS, take_steering
from latentdiff.cli.headings import Command
from latentdiff.cli.model import drawn_seed, loaded_model
from latentdiff.cli.options import ANY_PATH, GENERATE_OPTIONS, MODEL_OPTIONS
from latentdiff.cli.places import IMAGES
from latentdiff.errors import UsageError
from latentdiff.request.axes import NAMES, PROMPT, Axis, cells


def _axis(context: click.Context, parameter: click.Parameter, text: str | None) -> Axis | None:
    return None if text is None else Axis.parse(text)


def _flag(name: str, what: str) -> Any:
    return click.option(f"--{name}", callback=_axis, metavar="SETTING=V,V,...", help=what)


@click.command(cls=Command)
@click.argument(PROMPT)
@_flag("x", "The columns: a setting and its values, as steps=5,15,25, or words of the prompt, as 'prompt=cat|dog'.")
@_flag("y", "The rows.")
@_flag("z", "Blocks of columns and rows, one below the other.")
@click.option(
    "--out",
    type=ANY_PATH,
    callback=IMAGES,
    default="grid.png",
    show_default=True,
    metavar="FILE|FOLDER",
    help="The sheet; in a folder it is called grid.png. The images themselves are not kept.",
)
@GENERATE_OPTIONS
@STEERING_OPTIONS
@MODEL_OPTIONS
def grid(
    prompt: str, x: Axis | None, y: Axis | None, z: Axis | None, out: Path, seed: int | None, **settings: Any
) -> None:
    """Draw PROMPT under all combinations of some settings, on one sheet with labelled axes.

    The seed is the same for all images where no axis says otherwise.
    """
    axes = [axis for axis in (x, y, z) if axis]
    if not axes or axes != [x, y, z][: len(axes)]:
        raise UsageError(f"expected --x, then --y, then --z, each with one of {', '.join(NAMES)}")
    if settings.pop("num_images") != 1:
        raise UsageError("expected one image for each cell; for several, give an axis of seeds: --x seed=1,2,3")
    cells(axes, prompt, {})  # what is wrong with them is said before the model is loaded
    path = out if output.is_file(out) else out / "grid.png"
    output.check_image_file("--out", path)
    take_steering(settings)
    from latentdiff.diffusion.denoise import progress_bar
    from latentdiff.image import save_image
    from latentdiff.tasks.grid import draw_grid, grid_sheet

    with loaded_model(settings) as pipe, progress_bar(len(cells(axes, prompt, {})), True, unit="image") as bar:
        settings |= {"seed": drawn_seed(seed), "progress": False}
        images = draw_grid(pipe, prompt, axes, bar.update, **settings)
    save_image(grid_sheet(images, axes), path)
    click.echo(path)
