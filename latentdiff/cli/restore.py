"""`latentdiff restore`: repair an image whose damage is known."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

from latentdiff.cli.headings import Command
from latentdiff.cli.model import drawn_seed, loaded_model
from latentdiff.cli.options import (
    ANY_PATH,
    IMAGE_FILE,
    INVERT_MASK,
    MODEL_OPTIONS,
    RESULT_OPTIONS,
    flag,
    flags_of,
    within,
)
from latentdiff.cli.output import Writing, check_image_file, check_results, save_results
from latentdiff.cli.places import check_there
from latentdiff.cli.words import remark
from latentdiff.errors import UsageError
from latentdiff.request.options import BorderName, OperatorName, RestorationName, SeededOptions
from latentdiff.request.task_options import DAMAGE, MOTION, RESTORE, check_blur

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from latentdiff.tasks.restoration.operators import Operator

# Which options belong to which operators.
OWNERS = {
    "mask": ("inpaint",),
    "invert-mask": ("inpaint",),
    "factor": ("super-resolution",),
    "kernel": ("deblur", "super-resolution"),
}
OWNERS["border"] = OWNERS["kernel"]
NEEDED = {"inpaint": "mask", "super-resolution": "factor", "deblur": "kernel"}


@click.command(cls=Command)
@click.argument("image", type=IMAGE_FILE)
@click.option(
    "--operator", "name", type=click.Choice(get_args(OperatorName)), required=True, help="What happened to the image."
)
@click.option(
    "--mask", type=IMAGE_FILE, metavar="FILE", help="inpaint: white, or transparent, where the image is missing."
)
@INVERT_MASK
@click.option("--factor", type=int, metavar="N", help="super-resolution: how many times larger to make the image.")
@click.option(
    "--kernel",
    metavar="K",
    help="deblur: gaussian:STD, motion:LENGTH[:ANGLE] in pixels and degrees, or a file, .npy or a grey image. "
    "super-resolution: bicubic (the default), box or gaussian.",
)
@click.option(
    "--border",
    type=click.Choice(get_args(BorderName)),
    help="deblur, super-resolution: what lies beyond the image's border.  [default: reflect]",
)
@click.option(
    "--sigma",
    type=float,
    default=0.0,
    show_default=True,
    metavar="X",
    help="Standard deviation of the image's noise, where black is -1 and white 1; 0.1 is 13 of 255 grey levels.",
)
@click.option("--prompt", default="", metavar="TEXT", help="What the image shows, if known.")
@click.option("--method", type=click.Choice(get_args(RestorationName)), default="diffpir", show_default=True)
@click.option(
    "--set", "settings", multiple=True, metavar="NAME=VALUE", help="A setting of the method, such as zeta=1 of diffpir."
)
@flag("steps", default="50 for diffpir; see the documentation")
@flag("guidance_scale", default="3 with a prompt, 1 without")
@click.option(
    "-n", "samples", type=click.IntRange(1), default=1, show_default=True, metavar="N", help="Images to make."
)
@flags_of(SeededOptions)
@click.option("--mean", type=ANY_PATH, metavar="FILE", help="Also write the mean of the images.")
@click.option("--uncertainty", type=ANY_PATH, metavar="FILE", help="Also write how far they differ at each pixel.")
@MODEL_OPTIONS
@RESULT_OPTIONS
@within(RESTORE | DAMAGE)
def restore(
    image: Path,
    name: str,
    mask: Path | None,
    invert_mask: bool,
    factor: int | None,
    kernel: str | None,
    border: str | None,
    sigma: float,
    settings: tuple[str, ...],
    seed: int | None,
    mean: Path | None,
    uncertainty: Path | None,
    out: Path,
    compare: Path | None,
    **options: Any,
) -> None:
    """Repair IMAGE, whose damage is known: pixels missing, too small, blurred, noisy or without colour.

    Prints how far each result misses the damaged image once damaged again, which should be about --sigma.
    """
    given = {"mask": mask, "invert-mask": invert_mask or None, "factor": factor, "kernel": kernel, "border": border}
    _check_owners(name, given)
    _check_places(mean, uncertainty, options["samples"])
    writing = Writing.taken_from(options, out)
    check_results(out, compare, options["samples"])
    own = dict(map(_setting, settings))
    from latentdiff.image import as_rgb, open_image
    from latentdiff.tasks import restore as run

    damaged = as_rgb(open_image(image))
    operator = make_operator(name, damaged, mask, factor, kernel, border, sigma, invert_mask=invert_mask)
    remark(options, [options["prompt"]])
    with loaded_model(options) as pipe:
        found = run(pipe, image, operator, settings=own, seed=drawn_seed(seed), **options)
    save_results(found.images, out, {"damaged": damaged}, compare=compare, writing=writing)
    if mean:
        writing.save(found.mean, mean)
        click.echo(mean)
    if uncertainty:
        writing.save(found.uncertainty_image(), uncertainty)
        click.echo(uncertainty)
    misses = ", ".join(f"{value:.4f}" for value in found.residuals)
    click.echo(f"misses the measurement by {misses} (noise {found.noise_std:g})", err=True)


def make_operator(
    name: str,
    damaged: Image.Image,
    mask: Path | None,
    factor: int | None,
    kernel: str | None,
    border: str | None,
    sigma: float,
    *,
    invert_mask: bool = False,
) -> Operator:
    """The operator that the options name, for a damaged image.

    Raises:
        UsageError: an option is outside its domain.
        DataError: a file is missing or cannot be read.
    """
    from latentdiff.tasks import operators

    needed: Any = {"inpaint": mask, "super-resolution": factor, "deblur": kernel}.get(name)  # see `_check_owners`
    edges = {"border": border or "reflect", "noise_std": sigma}
    match name:
        case "inpaint":
            return operators.Inpaint(_missing(needed, damaged.size, invert_mask), noise_std=sigma)
        case "super-resolution":
            return operators.SuperResolution(needed, kernel=kernel or "bicubic", **edges)
        case "deblur":
            return operators.Deblur(_blur(needed), **edges)
        case "denoise":
            if sigma == 0.0:
                raise UsageError("expected the noise level to remove with --sigma, above 0; found 0")
            return operators.Denoise(noise_std=sigma)
    return operators.Colourise(noise_std=sigma)


def _missing(path: Path, size: tuple[int, int], invert: bool) -> Tensor:
    """The pixels to be filled, (H, W)."""
    import numpy as np
    import torch

    from latentdiff.image import open_image
    from latentdiff.tasks.masks import prepared_mask, read_mask

    mask = prepared_mask(read_mask(open_image(path), f"the mask {path}", invert=invert), size, grow=0, blur=0.0)
    return torch.from_numpy(np.asarray(mask) > 127)


def _blur(text: str) -> Tensor:
    """The kernel that `gaussian:STD`, `motion:LENGTH[:ANGLE]` or a file describes, (kh, kw)."""
    import numpy as np
    import torch

    from latentdiff.image import open_image
    from latentdiff.reading.arrays import read_array
    from latentdiff.reading.colours import as_8_bit
    from latentdiff.tasks.restoration.operators import gaussian_blur, motion_blur

    if values := _numbers(text):
        return (gaussian_blur if text.startswith("gaussian") else motion_blur)(*values)
    if not text.endswith(".npy"):
        return torch.from_numpy(np.asarray(as_8_bit(open_image(text)).convert("L"), dtype=np.float64))
    return torch.from_numpy(read_array(text))


def _numbers(text: str) -> list[float]:
    """What stands behind `gaussian:` or `motion:`; nothing for the name of a file."""
    shape, *numbers = text.split(":")
    if shape not in ("gaussian", "motion") or not numbers:
        return []
    try:
        values = [float(number) for number in numbers]
    except ValueError:
        values = []
    if not 1 <= len(values) <= (2 if shape == "motion" else 1):
        raise UsageError(f"expected a kernel gaussian:STD or motion:LENGTH:ANGLE, found {text!r}")
    if shape == "gaussian":
        check_blur(values[0])
    else:
        MOTION("the motion in pixels", values[0])
    return values


def _check_owners(name: str, given: dict[str, Any]) -> None:
    for option, value in given.items():
        if value is not None and name not in OWNERS[option]:
            raise UsageError(f"--{option} belongs to the operator {' or '.join(OWNERS[option])}, found it with {name}")
    if name in NEEDED and given[NEEDED[name]] is None:
        raise UsageError(f"the operator {name} needs --{NEEDED[name]}")
    if name == "deblur" and not _numbers(given["kernel"]):
        check_there("kernel", given["kernel"])


def _check_places(mean: Path | None, uncertainty: Path | None, samples: int) -> None:
    for option, place in (("--mean", mean), ("--uncertainty", uncertainty)):
        if place is None:
            continue
        if samples == 1:
            raise UsageError(f"{option} needs 2 or more images; ask for them with -n")
        check_image_file(option, place)


def _setting(text: str) -> tuple[str, float | bool]:
    name, _, value = text.partition("=")
    if value in ("true", "false"):
        return name, value == "true"
    try:
        return name, float(value)
    except ValueError as error:
        raise UsageError(f"expected --set NAME=VALUE with a number, true or false, found {text!r}") from error
