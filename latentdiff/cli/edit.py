"""`latentdiff edit`: change a picture towards a prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from latentdiff.cli.model import drawn_seed, loaded_model
from latentdiff.cli.options import ANY_PATH, MODEL_OPTIONS, RESULT_OPTIONS, SAMPLING_OPTIONS
from latentdiff.cli.output import check_results, save_results


@click.command()
@click.argument("picture", type=ANY_PATH)
@click.argument("prompt")
@click.option(
    "--strength", type=float, default=0.6, show_default=True, metavar="X", help="0 to 1: how far to go from the picture."
)
@click.option("--width", type=int, metavar="PIXELS", help="Bring the picture to this width first.  [default: its own]")
@click.option("--height", type=int, metavar="PIXELS", help="Bring the picture to this height first.  [default: its own]")
@SAMPLING_OPTIONS
@MODEL_OPTIONS
@RESULT_OPTIONS
def edit(
    picture: Path, prompt: str, out: Path, compare: Path | None, no_metadata: bool, seed: int | None, **settings: Any
) -> None:
    """Change PICTURE towards PROMPT (image to image): noise it as far as --strength says and denoise it."""
    check_results(out, compare, settings["num_images"])
    from latentdiff.image import as_rgb, open_image
    from latentdiff.tasks import image_to_image

    source = as_rgb(open_image(picture))
    with loaded_model(settings) as pipe:
        images = image_to_image(pipe, picture, prompt, seed=drawn_seed(seed), **settings)
    save_results(images, out, {"source": source}, compare=compare, metadata=not no_metadata)
