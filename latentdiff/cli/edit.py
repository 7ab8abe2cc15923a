"""`latentdiff edit`: change an image towards a prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from latentdiff.cli.controls import STEERING_OPTIONS, take_steering
from latentdiff.cli.headings import Command
from latentdiff.cli.model import drawn_seed, loaded_model
from latentdiff.cli.options import IMAGE_FILE, MODEL_OPTIONS, RESULT_OPTIONS, SAMPLING_OPTIONS, SIZE, within
from latentdiff.cli.output import Writing, check_results, check_transparency, save_results, shown_source
from latentdiff.cli.words import remark
from latentdiff.request.task_options import EDIT


@click.command(cls=Command)
@click.argument("image", type=IMAGE_FILE, metavar="IMAGE|INVERSION")
@click.argument("prompt")
@click.option(
    "--strength",
    type=float,
    metavar="X",
    help="0 to 1: how far to go from the image.  [default: 0.6, and 1 for a model that follows instructions]",
)
@click.option(
    "--image-guidance-scale",
    type=float,
    metavar="X",
    help="Of a model that follows instructions (InstructPix2Pix): how strongly to keep to the image.  [default: 1.5]",
)
@click.option(
    "--depth",
    type=IMAGE_FILE,
    metavar="FILE|FOLDER",
    help="Of a depth model (SD 2): a map of IMAGE, brighter where it is nearer, or the folder of a model of transformers "
    "that sees depths.  [default: the one in the model's folder]",
)
@SIZE
@SAMPLING_OPTIONS
@STEERING_OPTIONS
@MODEL_OPTIONS
@RESULT_OPTIONS
@within(EDIT)
def edit(image: Path, prompt: str, out: Path, compare: Path | None, seed: int | None, **settings: Any) -> None:
    """Change IMAGE towards PROMPT (image to image): noise it as far as --strength says and denoise it.

    With a model that follows instructions (InstructPix2Pix), PROMPT says what to do with it: "make it winter".

    What `latentdiff invert` wrote serves as well as an image, and keeps more of it: the walk begins from the image's
    own noise, so a seed changes nothing unless the sampler draws noise. It takes all steps of the inversion by default.
    """
    writing = Writing.taken_from(settings, out)
    check_results(out, compare, settings["num_images"])
    check_transparency(out, writing, image)
    take_steering(settings)
    remark(settings, [prompt])
    from latentdiff.tasks import image_to_image

    with loaded_model(settings) as pipe:
        images = image_to_image(pipe, image, prompt, seed=drawn_seed(seed), **settings)
        before = {"source": shown_source(pipe, image)} if compare else {}
    save_results(images, out, before, compare=compare, writing=writing)
