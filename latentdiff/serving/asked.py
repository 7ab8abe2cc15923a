"""From what an interface was sent to a `Draw`: the fields of options, their check, and the limits."""

from __future__ import annotations

import base64
import binascii
import secrets
from dataclasses import replace
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, create_model

from latentdiff.errors import DataError, UsageError
from latentdiff.reading.images import opened
from latentdiff.request.domains import Choice, Factor, Interval, Numbers, Pair, Real, Whole, YesNo
from latentdiff.request.option_texts import texts
from latentdiff.request.options import MOST_IMAGES, OPTIONS, checked
from latentdiff.serving.catalogue import Catalogue
from latentdiff.serving.errors import Refused
from latentdiff.serving.settings import Limits
from latentdiff.serving.work import Draw, Following, Sent

# Options that the server decides, or that every interface has under names of its own.
OTHERWISE = ("negative_prompt", "seed", "num_images", "width", "height", "batch_size", "callback", "progress")


def _kind(name: str) -> Any:
    """The type of an option as JSON has it; None for what can only be given in Python."""
    match OPTIONS[name].domain:
        case Choice(names):
            return Literal[names]
        case Whole():
            return int
        case Real() | Factor():
            return float
        case YesNo():
            return bool
        case Interval():
            return tuple[float, float]
        case Pair():
            return tuple[int, int]
        case Numbers():
            return list[float]
    return None


NAMES = tuple(name for name in OPTIONS if name not in OTHERWISE and _kind(name))


class Strict(BaseModel):
    """A body whose unknown names are errors."""

    model_config = ConfigDict(extra="forbid", strict=False, allow_inf_nan=False)


# One field for each option of generation, None where it is not given.
OptionFields: type[Strict] = create_model(
    "OptionFields", __base__=Strict, **{name: (_kind(name) | None, None) for name in NAMES}
)
for _name, _field in OptionFields.model_fields.items():
    _field.description = texts()[_name]
OptionFields.model_rebuild(force=True)


def options_in(body: BaseModel) -> dict[str, Any]:
    """The options of generation that a body gives.

    Raises:
        UsageError: a value outside its domain.
    """
    given = {name: value for name in NAMES if (value := getattr(body, name, None)) is not None}
    return checked(given)


def seeds_from(seed: int | None, count: int) -> list[int]:
    """Seeds, one for each image; none or a negative one draws the first."""
    _at_most("n", count, MOST_IMAGES, "images")  # before there is a list of that length
    first = secrets.randbelow(2**32) if seed is None or seed < 0 else seed
    if first + count > 2**64:
        raise Refused(400, f"expected a seed below 2**64, found {first}", param="seed", code="invalid_value")
    return [first + place for place in range(count)]


def check(
    draw: Draw, count: int, catalogue: Catalogue, limits: Limits, own: tuple[int, int] = (1024, 1024)
) -> Draw:
    """The draw with the LoRAs that its prompt names, if it is within the limits.

    Args:
        own: width and height of the model's training, where none are asked for.

    Raises:
        Refused: it is not.
    """
    _at_most("prompt", max(len(draw.prompt), len(draw.negative_prompt)), limits.prompt, "characters")
    _at_most("n", count, limits.images, "images")
    options = draw.options
    levels = max(options.get("steps") or 1, *(len(options.get(name) or ()) for name in ("sigmas", "timesteps")))
    second = options.get("hires_steps") or levels if options.get("hires") else 0
    _at_most("steps", levels * draw.task.get("repeats", 1) + second, limits.steps, "steps")
    width, height = _size(draw, limits)
    if factor := options.get("hires"):
        width, height = (round((side or usual) * factor) for side, usual in zip((width, height), own, strict=True))
    _at_most("size", max(width, height), limits.side, "pixels a side")
    _at_most("size", width * height, limits.pixels, "pixels")
    _at_most("controls", len(draw.controls) + len(draw.image_prompts), limits.controls, "controls and image prompts")
    for following in draw.controls:
        check_hint(following, limits)
    for resembling in draw.image_prompts:
        size_of(resembling.image, "image of an image prompt", limits)
    if count < 1:
        raise Refused(400, f"expected 1 image or more, found {count}", param="n", code="invalid_value")
    try:
        syntax = draw.options.get("prompt_syntax") or OPTIONS["prompt_syntax"].default
        tags, loras = catalogue.named(draw.prompt, syntax)
    except UsageError as error:
        raise Refused(400, str(error), param="prompt", code="invalid_value") from error
    return replace(draw, tags=tags, loras=loras)


def check_hint(following: Following, limits: Limits) -> None:
    """Raise a `Refused` if the image of a control is none, or too large as it is or as it is prepared."""
    name = "image of a control"
    size = size_of(following.image, name, limits)
    if following.resolution is not None:
        factor = following.resolution / min(size)
        _at_most(name, round(size[0] * size[1] * factor**2), limits.source_pixels, "pixels")


def _size(draw: Draw, limits: Limits) -> tuple[int, int]:
    """Width and height of what is to be made, 0 for those of the training; see `tasks.sources.resized`."""
    width, height = draw.width or 0, draw.height or 0
    if draw.image is None:
        return width, height
    if draw.mask is not None:
        size_of(draw.mask, "mask", limits)
    own_width, own_height = size_of(draw.image, "image", limits)
    if not (width or height):
        return own_width, own_height
    return width or round(own_width * height / own_height), height or round(own_height * width / own_width)


def size_of(sent: Sent, name: str, limits: Limits) -> tuple[int, int]:
    """Width and height of an image that was sent, from its header.

    Raises:
        Refused: it is none, or too large to be decoded.
    """
    try:
        with opened(sent.file, f"the {name}") as image:
            size = image.size
    except DataError as error:
        raise Refused(400, str(error), param=name, code="invalid_image") from error
    _at_most(name, size[0] * size[1], limits.source_pixels, "pixels")
    return size


def decoded(text: str, name: str) -> bytes:
    """The file that base64 text is, with or without the "data:" of a URL.

    Raises:
        UsageError: it is none.
    """
    if text.startswith("data:"):
        text = text.partition(",")[2]
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise UsageError(f"expected {name} in base64, found something else") from error


def _at_most(name: str, found: int, limit: int, unit: str) -> None:
    if found > limit:
        raise Refused(
            400, f"expected at most {limit:,} {unit}, found {found:,}", param=name, code="limit_exceeded"
        )
