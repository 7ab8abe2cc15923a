"""`latentdiff vary`: variations of an image."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from latentdiff.cli.controls import STEERING_OPTIONS, take_steering
from latentdiff.cli.headings import Command
from latentdiff.cli.model import drawn_seed, loaded_model
from latentdiff.cli.options import IMAGE_FILE, MODEL_OPTIONS, RESULT_OPTIONS, flags_of, within
from latentdiff.cli.output import Writing, check_results, save_results, shown_source
from latentdiff.cli.words import remark
from latentdiff.request.options import SizedOptions
from latentdiff.request.task_options import VARY


@click.command(cls=Command)
@click.argument("image", type=IMAGE_FILE)
@click.argument("prompt", default="")
@click.option(
    "--noise-level",
    type=int,
    default=0,
    show_default=True,
    metavar="N",
    help="0 to 999: how much noise what is seen of the image is under; more lets the images differ more.",
)
@flags_of(SizedOptions)
@STEERING_OPTIONS
@MODEL_OPTIONS
@RESULT_OPTIONS
@within(VARY)
def vary(image: Path, prompt: str, out: Path, compare: Path | None, seed: int | None, **settings: Any) -> None:
    """Make new images of what IMAGE shows, with an unCLIP model; PROMPT may say what to show besides."""
    writing = Writing.taken_from(settings, out)
    check_results(out, compare, settings["num_images"])
    take_steering(settings)
    remark(settings, [prompt])
    from latentdiff import tasks

    with loaded_model(settings) as pipe:
        images = tasks.vary(pipe, image, prompt, seed=drawn_seed(seed), **settings)
        before = {"source": shown_source(pipe, image)} if compare else {}
    save_results(images, out, before, compare=compare, writing=writing)
