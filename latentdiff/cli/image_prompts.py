"""Image prompts on the command line: images, the IP-Adapters that read them, and their image encoder."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from latentdiff.cli.headings import together
from latentdiff.cli.places import check_image
from latentdiff.errors import UsageError
from latentdiff.files import check_named
from latentdiff.request.option import flag_of

if TYPE_CHECKING:
    from latentdiff.adapters.control.image_prompts import IPAdapter

_NUMBER = r"\d*\.?\d+"
_WITH_NUMBERS = re.compile(rf"(?P<file>.+?)(?::(?P<scale>{_NUMBER}))?(?:@(?P<start>{_NUMBER})-(?P<end>{_NUMBER}))?")

IMAGE_PROMPT = click.option(
    "--image-prompt",
    multiple=True,
    metavar="FILE[:SCALE][@START-END]",
    help="An image to resemble, by --ip-adapter: how strongly, and in which share of the steps. Repeat it for several.  "
    "[default: 1, 0-1]",
)
IP_ADAPTER = click.option(
    "--ip-adapter",
    multiple=True,
    metavar="FILE|FOLDER",
    help="The IP-Adapter for all --image-prompt, or repeated, one for each in order.",
)
IMAGE_ENCODER = click.option(
    "--image-encoder",
    metavar="FOLDER",
    help="Where the image encoder of --ip-adapter lies.  [default: image_encoder beside it]",
)
NEGATIVE = click.option(
    "--negative-image-prompt", metavar="FILE", help="An image not to resemble.  [default: one that says nothing]"
)
BLOCKS = click.option(
    "--image-prompt-blocks",
    metavar="style|layout|BLOCK=X,...",
    help="Where image prompts act: on the blocks of SDXL that decide style or layout, or on blocks by their names, as in "
    "up_blocks.1=0.5.  [default: everywhere]",
)


# `take_image_prompts` takes them out of the settings.
IMAGE_PROMPT_OPTIONS = together(IMAGE_PROMPT, IP_ADAPTER, IMAGE_ENCODER, NEGATIVE, BLOCKS)


def take_image_prompts(settings: dict[str, Any]) -> None:
    """Put the image prompts of a command into `settings`, and take out what named them.

    Raises:
        UsageError: image prompts without an adapter, or the other way round, or not one for all or for each.
        LatentDiffError: a file is missing or something else.
    """
    images, adapters = settings.pop("image_prompt"), settings.pop("ip_adapter")
    rest = {name: settings.pop(name) for name in ("image_encoder", "negative_image_prompt", "image_prompt_blocks")}
    if not images:
        given = [flag_of(name) for name, value in {"ip_adapter": adapters, **rest}.items() if value]
        if given:
            raise UsageError(f"expected --image-prompt FILE with {given[0]}, found none; give an image to resemble")
        return
    if not adapters:
        raise UsageError("expected --ip-adapter FILE with --image-prompt, found none; it is what reads the image")
    if len(adapters) not in (1, len(images)):
        raise UsageError(
            f"expected one --ip-adapter for all image prompts, or {len(images)}, one for each, found {len(adapters)}"
        )
    asked = [with_numbers(image) for image in images]
    for file in filter(None, (*(file for file, _ in asked), rest["negative_image_prompt"])):
        check_image(file)
    for place in filter(None, (*adapters, rest["image_encoder"])):
        check_named(place)
    from latentdiff.adapters.control.image_prompts import IPAdapter

    loaded: dict[str, IPAdapter] = {}
    prompts = []
    for (file, options), place in zip(asked, adapters * (len(images) // len(adapters)), strict=True):
        if place not in loaded:
            loaded[place] = IPAdapter.load(place, image_encoder=rest["image_encoder"])
        more = {"negative": rest["negative_image_prompt"], "blocks": rest["image_prompt_blocks"]}
        prompts.append(loaded[place](file, **options, **more))
    settings["image_prompts"] = prompts


def with_numbers(text: str) -> tuple[str, dict[str, float]]:
    """ "file:0.8@0.0-0.6" -> the file, and its scale, start and end as far as they are given."""
    match = None if Path(text).exists() else _WITH_NUMBERS.fullmatch(text)
    if match is None:
        return text, {}
    numbers = {name: float(match[name]) for name in ("scale", "start", "end") if match[name] is not None}
    return match["file"], numbers
