"""`latentdiff inpaint`: paint a part of an image, or beyond its border."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from latentdiff.cli.controls import STEERING_OPTIONS, take_steering
from latentdiff.cli.headings import Command
from latentdiff.cli.model import drawn_seed, loaded_model
from latentdiff.cli.options import IMAGE_FILE, INVERT_MASK, MODEL_OPTIONS, RESULT_OPTIONS, SAMPLING_OPTIONS, within
from latentdiff.cli.output import Writing, check_results, check_transparency, save_results
from latentdiff.cli.words import remark
from latentdiff.errors import UsageError
from latentdiff.request.task_options import INPAINT


@click.command(cls=Command)
@click.argument("image", type=IMAGE_FILE)
@click.argument("prompt", default="")
@click.option(
    "--mask", type=IMAGE_FILE, metavar="FILE", help="An image of the same size, white, or transparent, where to paint."
)
@INVERT_MASK
@click.option(
    "--inversion",
    type=IMAGE_FILE,
    metavar="FILE",
    help="What `latentdiff invert` made of IMAGE: paint from its noise, which keeps the layout of what was there.",
)
@click.option("--remove", is_flag=True, help="Take away what the mask covers; PROMPT may say what is behind it.")
@click.option(
    "--strength",
    type=float,
    metavar="X",
    help="0 to 1: less than 1 keeps something of what was there.  [default: 1, with --remove 0.5]",
)
@click.option("--grow", type=int, default=0, show_default=True, metavar="PIXELS", help="Widen the mask by this much.")
@click.option(
    "--blur", type=float, default=0.0, show_default=True, metavar="PIXELS", help="Soften its edge by this much."
)
@click.option(
    "--only-masked", is_flag=True, help="Cut the masked part out and paint it at the full resolution of the model."
)
@click.option(
    "--padding",
    type=int,
    metavar="PIXELS",
    help="What --only-masked shows around the mask.  [default: 1/16 of the training's side]",
)
@click.option(
    "--extend",
    type=int,
    nargs=4,
    default=(0, 0, 0, 0),
    metavar="LEFT TOP RIGHT BOTTOM",
    help="Outpainting: pixels to add on each side; a mask is not needed then.",
)
@click.option(
    "--repeats",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    metavar="N",
    help="Take each step N times, noised again in between: fits better into the image, at N times the cost.",
)
@click.option(
    "--soft",
    is_flag=True,
    help="Let grey say how far a place may go from the image; --blur makes a mask grey at its edge.",
)
@SAMPLING_OPTIONS
@STEERING_OPTIONS
@MODEL_OPTIONS
@RESULT_OPTIONS
@within(INPAINT)
def inpaint(
    image: Path,
    prompt: str,
    mask: Path | None,
    out: Path,
    compare: Path | None,
    seed: int | None,
    **settings: Any,
) -> None:
    """Paint PROMPT where the mask of IMAGE is white; where it is black, no pixel changes, transparent ones neither.

    To put a thing in, say what it stands on as well, and paint the masked part alone:
    --only-masked "a red balloon on a blue background".
    """
    if not prompt and not settings["remove"] and not any(settings["extend"]):
        raise UsageError("expected a PROMPT that says what to paint, or --remove to take away what the mask covers")
    if mask is None and not any(settings["extend"]):
        raise UsageError("expected --mask FILE, or --extend, margins to paint beyond the image; found neither")
    writing = Writing.taken_from(settings, out)
    check_results(out, compare, settings["num_images"])
    take_steering(settings)
    from latentdiff import tasks
    from latentdiff.image import as_rgb, open_image
    from latentdiff.tasks.masks import read_mask

    before = {"source": as_rgb(open_image(image))}
    if mask:
        before["mask"] = read_mask(open_image(mask), f"the mask {mask}", invert=settings["invert_mask"])
    check_transparency(out, writing, image, before.get("mask"))
    remark(settings, [prompt])
    with loaded_model(settings) as pipe:
        images = tasks.inpaint(pipe, image, mask, prompt, seed=drawn_seed(seed), **settings)
    save_results(images, out, before, compare=compare, writing=writing)
