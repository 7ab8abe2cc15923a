"""`latentdiff invert`: find the noise that sampling would make an image of."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import click

from latentdiff.cli.headings import Command
from latentdiff.cli.model import loaded_model
from latentdiff.cli.options import ANY_PATH, IMAGE_FILE, MODEL_OPTIONS, SIZE, flag, within
from latentdiff.cli.output import check_writable
from latentdiff.cli.places import written
from latentdiff.cli.words import remark
from latentdiff.errors import UsageError
from latentdiff.request.options import InversionName
from latentdiff.request.task_options import INVERT


@click.command(cls=Command)
@click.argument("image", type=IMAGE_FILE)
@click.option("--prompt", default="", metavar="TEXT", help="What the image shows; edict and null-text need it.")
@click.option(
    "--method",
    type=click.Choice(get_args(InversionName)),
    default="fixed-point",
    show_default=True,
    help="edict is exact, and for editing by edict; null-text is for editing by null-text, and slow.",
)
@click.option("--steps", type=int, default=50, show_default=True, metavar="N", help="Steps up in noise, 1 to 1000.")
@click.option(
    "--iterations",
    type=int,
    default=1,
    show_default=True,
    metavar="N",
    help="Corrections of each step of fixed-point and null-text; each costs as much as the step and brings it nearer.",
)
@click.option(
    "--guidance",
    "guidance_scale",
    type=float,
    metavar="X",
    help="For which edict (3) and null-text (5) are made to be exact.",
)
@click.option("--mixing", type=float, metavar="X", help="0.5 to 1: edict's coupling.  [default: 0.93 at 50 steps]")
@flag("spacing")
@SIZE
@click.option("--no-check", is_flag=True, help="Do not sample back to measure the error: saves up to half of the time.")
@click.option(
    "--out",
    type=ANY_PATH,
    callback=written(".inversion", folder=False),
    metavar="FILE.inversion",
    help="Where to write.  [default: IMAGE's name with .inversion, here]",
)
@MODEL_OPTIONS
@within(INVERT)
def invert(image: Path, out: Path | None, no_check: bool, **settings: Any) -> None:
    """Invert IMAGE: find the noise, and every step of the way, from which sampling leads back to it.

    The file that is written serves `translate` and `edit` in place of the image, and `inpaint --inversion` beside it.
    """
    out = out or Path(image.stem + ".inversion")
    if out.exists():
        raise UsageError(f"{out} is there already; remove it or choose another name with --out")
    check_writable(out)
    remark(settings, [settings["prompt"]])
    from latentdiff.tasks.inversion import invert as invert_image

    with loaded_model(settings) as pipe:
        found = invert_image(pipe, image, measure=not no_check, **settings)
    found.save(out)
    click.echo(out)
    if found.reconstruction_db is not None and found.floor_db is not None:
        click.echo(f"reconstruction: {found.reconstruction_db:.2f} dB; the VAE alone keeps {found.floor_db:.2f} dB")
    noise = found.noise_statistics()
    click.echo(
        f"noise: mean {noise['mean']:.3f}, standard deviation {noise['std']:.3f}, "
        f"correlation of neighbours {noise['autocorrelation']:.3f} (0, 1 and 0 are ideal)"
    )
