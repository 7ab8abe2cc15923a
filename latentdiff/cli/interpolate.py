"""`latentdiff interpolate`: from one prompt to the next."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from latentdiff.cli.controls import STEERING_OPTIONS, take_steering
from latentdiff.cli.headings import Command
from latentdiff.cli.model import drawn_seed, loaded_model
from latentdiff.cli.options import (
    ANY_PATH,
    MODEL_OPTIONS,
    WRITING,
    flags_of,
    within,
)
from latentdiff.cli.output import Writing, check_count, check_writable
from latentdiff.cli.places import written
from latentdiff.cli.words import remark
from latentdiff.errors import UsageError
from latentdiff.files import IMAGE_FORMATS
from latentdiff.request.options import SizedOptions
from latentdiff.request.task_options import INTERPOLATE


@click.command(cls=Command)
@click.argument("prompts", nargs=-1, metavar="PROMPT PROMPT...")
@click.option("--frames", type=click.IntRange(2), default=24, show_default=True, metavar="N", help="Images in all.")
@click.option(
    "--fps", type=click.FloatRange(0.1, 50), default=12.0, show_default=True, metavar="X", help="Speed of a GIF."
)
@click.option(
    "--same-noise", is_flag=True, help="Give all prompts the start noise of the first: only the text changes."
)
@click.option(
    "--out",
    type=ANY_PATH,
    callback=written(*IMAGE_FORMATS, ".gif", folder=True),
    default="frames",
    show_default=True,
    metavar="FOLDER|FILE.gif",
    help="A new or empty folder for frame-000.png, ..., or an animation, in 256 colours a frame.",
)
@flags_of(SizedOptions, without=("num_images",))
@STEERING_OPTIONS
@MODEL_OPTIONS
@WRITING
@within(INTERPOLATE)
def interpolate(prompts: tuple[str, ...], fps: float, out: Path, seed: int | None, **settings: Any) -> None:
    """Make a way of images from the first PROMPT over all others to the last, as frames or as a GIF."""
    if len(prompts) < 2:
        raise UsageError(f"expected two prompts or more to go between, found {len(prompts)}")
    writing = Writing.taken_from(settings, out)
    is_animation = out.suffix.lower() == ".gif"
    _check_place(out, is_animation, settings["frames"])
    take_steering(settings)
    remark(settings, prompts)
    from latentdiff import tasks
    from latentdiff.files import atomic_path

    with loaded_model(settings) as pipe:
        frames = tasks.interpolate(pipe, prompts, seed=drawn_seed(seed), **settings)
    if is_animation:
        with atomic_path(out) as temporary:
            temporary.write_bytes(tasks.interpolation.animation(frames, fps, metadata=writing.metadata))
    else:
        digits = max(3, len(str(len(frames) - 1)))
        for number, frame in enumerate(frames):
            writing.save(frame, out / f"frame-{number:0{digits}}{writing.ending}")
    click.echo(out)


def _check_place(out: Path, is_animation: bool, frames: int) -> None:
    if not is_animation:
        check_count(out, frames)
    check_writable(out.parent if is_animation else out)
    is_taken = out.is_file() or out.is_dir() and (is_animation or any(out.iterdir()))
    if is_taken:
        raise UsageError(f"{out} is there already; remove it or choose another place with --out")
