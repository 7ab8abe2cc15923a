"""`latentdiff upscale`: make an image larger."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from latentdiff.cli.options import DEVICE, IMAGE_FILE, OUT, WRITING
from latentdiff.cli.output import Writing, check_transparency, check_writable, free_path, is_file
from latentdiff.errors import CheckpointError, UsageError


@click.command()
@click.argument("image", type=IMAGE_FILE)
@click.option(
    "--model",
    metavar="FILE",
    required=True,
    help="An upscaler of the ESRGAN family, .safetensors or .pth; it says how many times larger.",
)
@click.option(
    "--tile",
    type=int,
    default=512,
    show_default=True,
    metavar="PIXELS",
    help="Side of what the upscaler sees at once, 128 or more: memory grows with it and not with the image.",
)
@DEVICE
@OUT
@WRITING
def upscale(image: Path, model: str, tile: int, device: str, out: Path, **settings: Any) -> None:
    """Make IMAGE larger by a network that was trained for it."""
    writing = Writing.taken_from(settings, out)
    check_writable(out)
    if is_file(out) and out.exists():
        raise UsageError(f"{out} is there already; remove it or choose another name with --out")
    if not Path(model).exists():
        raise CheckpointError(f"no upscaler at {model}")
    check_transparency(out, writing, image)
    from latentdiff.tasks.upscaling import upscale as enlarge
    from latentdiff.upscaling.model import Upscaler

    upscaler = Upscaler.load(model, device=device)
    result = enlarge(image, upscaler, tile=tile)
    path = out if is_file(out) else free_path(out, f"{image.stem}-{upscaler.factor}x", writing.ending)
    writing.save(result, path)
    click.echo(path)
