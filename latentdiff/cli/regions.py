"""Regions on the command line: `--region "left=a cat" --region "0.5,0,1,1:0.9=a dog" --region mask.png="a tree"`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import click

from latentdiff.cli.places import check_image
from latentdiff.errors import UsageError
from latentdiff.request.options import REGION_WEIGHT

_WEIGHTED = re.compile(r"(?P<place>.+?)(?::(?P<weight>\d*\.?\d+))?")
_NUMBERS = re.compile(r"[-+.\deE, ]*,[-+.\deE, ]*")
_WORDS = re.compile(r"[a-z]+([ -][a-z]+)*")

REGION = click.option(
    "--region",
    multiple=True,
    metavar="PLACE[:WEIGHT]=PROMPT",
    help="A prompt for a part of the image: PLACE is left, right, top, bottom, center or two of them, a box x0,y0,x1,y1 in "
    f"shares of the image, or a mask FILE. WEIGHT is its share there against the main prompt.  [default: {REGION_WEIGHT}]",
)


def take_regions(settings: dict[str, Any]) -> None:
    """Put the regions of a command into `settings`, and take out what named them.

    Raises:
        UsageError: one that is not PLACE[:WEIGHT]=PROMPT, or has no place in the image.
        DataError: a mask is missing or no image.
    """
    parsed = [parse_region(text) for text in settings.pop("region")]
    if parsed:
        from latentdiff.adapters.control.regions import Region

        settings["regions"] = [Region(prompt, **where) for prompt, where in parsed]


def parse_region(text: str) -> tuple[str, dict[str, Any]]:
    """ "left:0.8=a cat" -> "a cat", and its place and weight.

    Raises:
        UsageError: it is not PLACE[:WEIGHT]=PROMPT.
        DataError: a mask is missing.
    """
    place, equals, prompt = text.partition("=")
    match = _WEIGHTED.fullmatch(place.strip())
    if not equals or match is None:
        raise UsageError(f'expected --region PLACE[:WEIGHT]=PROMPT, as in "left=a cat", found {text!r}')
    weight = {} if match["weight"] is None else {"weight": float(match["weight"])}
    where = match["place"].strip()
    if _NUMBERS.fullmatch(where):
        return prompt.strip(), {"box": where.split(","), **weight}
    if _WORDS.fullmatch(where) and not Path(where).exists():
        return prompt.strip(), {"box": where, **weight}
    check_image(where)
    return prompt.strip(), {"mask": where, **weight}
