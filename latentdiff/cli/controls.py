"""What steers besides the prompt, on the command line: controls, images and models in pairs, and image prompts; and
`latentdiff control prepare`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from latentdiff.cli.headings import under
from latentdiff.cli.image_prompts import IMAGE_PROMPT_OPTIONS, take_image_prompts, with_numbers
from latentdiff.cli.options import ANY_PATH
from latentdiff.cli.output import check_image_file, check_writable
from latentdiff.cli.places import ImageFile, check_image, written
from latentdiff.cli.regions import REGION, take_regions
from latentdiff.errors import UsageError
from latentdiff.files import check_named
from latentdiff.request.option import SteeringOption
from latentdiff.request.options import CONTROL_MODES, PREPARATIONS

if TYPE_CHECKING:
    from latentdiff.adapters.control.model import Control

DEPTH = "depth"
_EDGES, _LINES = {"low", "high"}, {"sigma"}
_OPTIONS = {"canny": _EDGES, "scribble": _EDGES, "tile": {"factor"}, "xdog": _LINES, "sobel": _LINES}

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


# `take_steering` takes them out of the settings.
STEERING_OPTIONS = under(SteeringOption.heading, REGION, CONTROL, CONTROL_MODEL, GUESS, IMAGE_PROMPT_OPTIONS)


def take_steering(settings: dict[str, Any]) -> None:
    """Put the regions, controls and image prompts of a command into `settings`, and take out what named them.

    Raises:
        UsageError: what belongs together is not given together.
        LatentDiffError: a file is missing or something else.
    """
    take_regions(settings)
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
    from latentdiff.adapters.control.model import ControlNet

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
    """Prepare the images that ControlNets follow, and convert ControlNets."""


@control.command()
@click.argument("kind", metavar=f"[{'|'.join((*PREPARATIONS, DEPTH))}]")
@click.argument("image", type=ImageFile(), metavar="IMAGE")
@click.option("--out", type=click.Path(path_type=Path), required=True, metavar="FILE", help="Where to write the hint.")
@click.option("--low", type=int, metavar="N", help="Of canny and scribble: an edge goes on above this.  [default: 100]")
@click.option("--high", type=int, metavar="N", help="Of canny and scribble: an edge begins above this.  [default: 200]")
@click.option("--factor", type=int, metavar="N", help="Of tile: how much smaller the details are.  [default: 8]")
@click.option("--sigma", type=float, metavar="X", help="Of xdog and sobel: blur in pixels, for broader lines.  [default: 1]")
@click.option("--model", metavar="FOLDER", help="Of depth: a folder of transformers' AutoModelForDepthEstimation.")
def prepare(kind: str, image: Path, out: Path, model: str | None, **options: float | None) -> None:
    """Make the hint of a ControlNet of IMAGE.

    canny: edges. scribble: strokes. xdog: drawn lines, for lineart. sobel: soft edges. tile: the image without details.
    depth: how near things are, by a model that you name.
    """
    check_image_file("--out", out)
    from latentdiff.adapters.control.preparation import prepared
    from latentdiff.image import open_image, save_image

    given = {name: value for name, value in options.items() if value is not None}
    takes = _OPTIONS.get(kind, set())
    if foreign := given.keys() - takes:
        raise UsageError(f"{kind} takes no --{sorted(foreign)[0]}; leave it out")
    if (kind == DEPTH) != (model is not None):
        raise UsageError(
            f"expected --model FOLDER with {DEPTH} and with nothing else, found {'none' if model is None else kind};"
            " take a folder of transformers, such as Depth Anything's"
        )
    if model is not None:
        from latentdiff.adapters.control.depth import DepthModel

        hint = DepthModel.load(model)(open_image(image))
    else:
        hint = prepared(open_image(image), kind, **given)
    save_image(hint, out, metadata=False)
    click.echo(out)


@control.command()
@click.argument("source", metavar="IN")
@click.argument("target", metavar="OUT", type=ANY_PATH, callback=written(".safetensors", folder=True))
@click.option("--base", metavar="MODEL", help="Of a file with differences: the model that they are added to.")
def convert(source: str, target: Path, base: str | None) -> None:
    """Convert the ControlNet IN to OUT: a name ending in .safetensors is the original layout, others a diffusers folder.

    There and back, every tensor has the same name, type and bits.
    """
    check_named(source)
    is_single = target.suffix.lower() == ".safetensors"
    check_writable(target.parent if is_single else target)
    if is_single and target.is_dir():
        raise UsageError(f"cannot write {target}: it is a folder")
    from latentdiff.checkpoints.control_layouts import convert_control

    convert_control(source, target, base)
    click.echo(target)
