"""`latentdiff data`: what training will see of captioned images."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from latentdiff.cli.options import ANY_PATH, DEVICE, MODEL
from latentdiff.cli.output import check_image_file
from latentdiff.cli.places import check_data
from latentdiff.errors import printable

if TYPE_CHECKING:
    from latentdiff.pipeline import Pipeline
    from latentdiff.training.data import Dataset
    from latentdiff.training.data.check import CheckReport


@click.group()
def data() -> None:
    """Captioned images: what training will see of them."""


@data.command()
@click.argument("sources", nargs=-1, required=True, metavar="FOLDER...")
@click.option("--validation", metavar="FOLDER", help="Held-out images; report those that are in training too.")
@click.option(
    "--sheet",
    type=ANY_PATH,
    metavar="FILE",
    help="Draw images as training sees them, beside what the VAE makes of them.",
)
@click.option(
    "--sheet-images", type=click.IntRange(1), default=16, show_default=True, metavar="N", help="Images on the sheet."
)
@MODEL
@click.option(
    "--resolution", type=click.IntRange(8), metavar="N", help="Side of the square bucket.  [default: the model's]"
)
@click.option(
    "--bucket-step",
    type=click.IntRange(1),
    metavar="N",
    help="Sides of buckets are multiples of N.  [default: 64, or 4 latents below 256 pixels]",
)
@click.option("--max-aspect", type=click.FloatRange(1), default=2.0, show_default=True, metavar="X", help="Of buckets.")
@click.option("--upscale", is_flag=True, help="Enlarge images that are smaller than their bucket.")
@click.option("--background", default="white", show_default=True, metavar="COLOUR", help="Under transparent images.")
@click.option(
    "--caption-column", metavar="NAME", help="Of metadata files and data sets.  [default: text, caption, ...]"
)
@click.option(
    "--long-captions",
    type=click.Choice(["cut", "chunk"]),
    default="cut",
    show_default=True,
    help="What training will do with captions that are too long.",
)
@click.option("--allow-missing", is_flag=True, help="Images without captions are wanted.")
@click.option("--strict", is_flag=True, help="An unreadable image is an error, not left out.")
@DEVICE
def check(
    sources: tuple[str, ...],
    validation: str | None,
    sheet: Path | None,
    sheet_images: int,
    model: str | None,
    resolution: int | None,
    device: str,
    long_captions: str,
    **options: Any,
) -> int:
    """Look at every image and caption before anything is spent on training.

    A FOLDER holds metadata.jsonl, .csv or .parquet (file_name and text), or a .txt or .caption file beside each image,
    or WebDataset shards, or a saved Hugging Face data set; a hub id is looked up. For finetune --loss dpo, the metadata
    name pairs of images: preferred, rejected and text. The exit code is 1 if training would fail.
    """
    if sheet is not None:
        check_image_file("--sheet", sheet)
    for source in (*sources, *((validation,) if validation else ())):
        check_data(source)
    from latentdiff.pipeline import Pipeline
    from latentdiff.training.data.captions import lost_words
    from latentdiff.training.data.check import check as look

    # What only the report needs is allowed here, so that it names everything that is wrong at once.
    reading = {"caption_column": options["caption_column"], "background": options["background"], "verify": False}
    training = _read(sources, reading)
    held_out = _read((validation,), reading) if validation else None
    pipe = Pipeline.load(model, device=device)
    report = look(
        training,
        _preprocessing(pipe, resolution, options),
        lost_words=lambda caption: lost_words(pipe.tokenizer, caption, long_captions),
        validation=held_out,
    )
    for line in report.lines():
        click.echo(printable(line))
    if sheet is not None and any(report.buckets):
        _write_sheet(sheet, sheet_images, pipe, training, report)
    return 1 if report.failures else 0


def _read(sources: tuple[str, ...], reading: dict[str, Any]) -> Dataset:
    from latentdiff.training.data import read_dataset

    return read_dataset(sources, allow_missing=True, pairs=None, **reading)


def _preprocessing(pipe: Pipeline, resolution: int | None, options: dict[str, Any]) -> Any:
    from latentdiff.training.data.buckets import default_step
    from latentdiff.training.data.check import Preprocessing

    side = resolution or min(pipe.default_size)
    return Preprocessing(
        resolution=side,
        step=options["bucket_step"] or default_step(side, pipe.vae.config.downscale),
        **{name: options[name] for name in ("max_aspect", "upscale", "strict", "allow_missing")},
    )


def _write_sheet(path: Path, count: int, pipe: Pipeline, training: Dataset, report: CheckReport) -> None:
    from latentdiff.image import save_image
    from latentdiff.training.data.sheet import training_sheet

    drawn, psnr = training_sheet(
        training, report.buckets, lambda image: pipe.decode(pipe.encode_images(image).mode()), count=count
    )
    save_image(drawn, path)
    click.echo(f"VAE: {psnr:.1f} dB on the images of the sheet")
    click.echo(path)
