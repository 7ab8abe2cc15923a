"""What steers besides the prompt, on the command line: controls, images and models in pairs, and image prompts; and
`latentdiff control prepare`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from latentdiff.cli.image_prompts import image_prompt_options, take_image_prompts, with_numbers
from latentdiff.cli.output import check_image_file
from latentdiff.cli.places import ImageFile, check_image
from latentdiff.errors import UsageError
from latentdiff.files import check_named
from latentdiff.request.options import CONTROL_MODES, PREPARATIONS

if TYPE_CHECKING:
    from latentdiff.control.model import Control

CONTROL = click.option(
    "--control",
    multiple=True,
    metavar="[KIND=]FILE",
    help="An image for --control-model to follow: a hint as it was trained on, or a photograph to make one of first, "
    f"KIND={'|'.join(PREPARATIONS)}. Repeat both for several.",
)
CONTROL_MODEL = click.option(
    "--control-model",
    multiple=True,
    metavar="[MODE=]FILE|FOLDER[:SCALE][@START-END]",
    help="The ControlNet for each --control, how strongly it acts, and in which share of the steps [default: 1, 0-1]. Of a "
    f"union, MODE is what the image shows: {', '.join(CONTROL_MODES)}.",
)
GUESS = click.option(
    "--control-guess",
    is_flag=True,
    help="Let ControlNets act on the prompt alone, for images without one (guess mode).",
)


def steering_options(command: Any) -> Any:
    """The options of controls and image prompts; `take_steering` takes them out of the settings."""
    return CONTROL(CONTROL_MODEL(GUESS(image_prompt_options(command))))


def take_steering(settings: dict[str, Any]) -> None:
    """Put the controls and image prompts of a command into `settings`, and take out what named them.

    Raises:
        UsageError: what belongs together is not given together.
        LatentDiffError: a file is missing or something else.
    """
    _take_controls(settings)
    take_image_prompts(settings)


def _take_controls(settings: dict[str, Any]) -> None:
    """Put the controls of a command into `settings`, and take out what named them.

    Raises:
        UsageError: not one model for each image.
        LatentDiffError: a file is missing or something else.
    """
    images, models = settings.pop("control"), settings.pop("control_model")
    guess = settings.pop("control_guess")
    if len(images) != len(models):
        raise UsageError(
            f"expected a --control-model for each --control, found {len(models)} for {len(images)}; give both, in order"
        )
    if guess and not images:
        raise UsageError("expected --control and --control-model with --control-guess, found neither")
    if not images:
        return
    pairs = [(*parse_control(image), *parse_control_model(text)) for image, text in zip(images, models, strict=True)]
    for _, file, place, _ in pairs:
        check_image(file)
        check_named(place)
    from latentdiff.control.model import ControlNet

    loaded: dict[str, ControlNet] = {}
    controls: list[Control] = []
    for kind, file, place, options in pairs:
        if place not in loaded:
            loaded[place] = ControlNet.load(place)
        controls.append(loaded[place](file, guess=guess, prepare=kind, **options))
    settings["controls"] = controls


def parse_control(text: str) -> tuple[str | None, str]:
    """ "canny=photo.png" -> ("canny", "photo.png"); without a kind, None and the file.

    Raises:
        UsageError: what looks like a kind is none.
    """
    kind, equals, file = text.partition("=")
    if not equals or Path(text).exists():
        return None, text
    if kind not in PREPARATIONS:
        raise UsageError(f"expected --control [KIND=]FILE with a KIND of {', '.join(PREPARATIONS)}, found {text!r}")
    return kind, file


def parse_control_model(text: str) -> tuple[str, dict[str, Any]]:
    """ "depth=file:0.8@0.0-0.6" -> the file, and its mode, scale, start and end as far as they are given."""
    mode, equals, rest = text.partition("=")
    if equals and mode in CONTROL_MODES and not Path(text).exists():
        file, numbers = with_numbers(rest)
        return file, {"mode": mode, **numbers}
    return with_numbers(text)


@click.group()
def control() -> None:
    """Prepare the images that ControlNets follow."""


@control.command()
@click.argument("kind", type=click.Choice(PREPARATIONS))
@click.argument("image", type=ImageFile(), metavar="IMAGE")
@click.option("--out", type=click.Path(path_type=Path), required=True, metavar="FILE", help="Where to write the hint.")
@click.option("--low", type=int, metavar="N", help="Of canny and scribble: an edge goes on above this.  [default: 100]")
@click.option("--high", type=int, metavar="N", help="Of canny and scribble: an edge begins above this.  [default: 200]")
@click.option("--factor", type=int, metavar="N", help="Of tile: how much smaller the details are.  [default: 8]")
def prepare(kind: str, image: Path, out: Path, **options: int | None) -> None:
    """Make the hint of a ControlNet of IMAGE: edges (canny), strokes (scribble), or the image without details (tile)."""
    check_image_file("--out", out)
    from latentdiff.control.preparation import prepared
    from latentdiff.image import open_image, save_image

    given = {name: value for name, value in options.items() if value is not None}
    foreign = given.keys() - ({"factor"} if kind == "tile" else {"low", "high"})
    if foreign:
        raise UsageError(f"{kind} takes no --{sorted(foreign)[0]}; leave it out")
    save_image(prepared(open_image(image), kind, **given), out, metadata=False)
    click.echo(out)
