"""A grid: the same image under all combinations of some settings, on one sheet with labelled axes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from latentdiff.errors import UsageError
from latentdiff.pipeline import Pipeline
from latentdiff.request.axes import PROMPT, Axis, cells

GAP = 6  # pixels between cells
_TOGETHER = (PROMPT, "negative_prompt", "seed")  # may differ within one call of the pipeline
Places = tuple[int, ...]


def draw_grid(
    pipe: Pipeline,
    prompt: str,
    axes: Sequence[Axis],
    done: Callable[[int], object] = lambda count: None,
    **options: Any,
) -> dict[Places, Image.Image]:
    """One image for each combination of values, by its places on the axes, with its recipe in `info`.

    Args:
        axes: one to three; the columns, the rows, the sheets.
        done: told after every call of the pipeline how many images it has made.
        options: of `Pipeline.__call__`; the seed is the same for all where no axis says otherwise.

    Raises:
        UsageError: no axis, more than three, or one that does not fit the prompt; what the pipeline refuses.
    """
    if not 1 <= len(axes) <= 3:
        raise UsageError(f"expected one to three axes, found {len(axes)}")
    made: dict[Places, Image.Image] = {}
    wanted = sorted(cells(axes, prompt, options), key=lambda cell: _shape(cell[2]))
    for _, some in groupby(wanted, key=lambda cell: _shape(cell[2])):
        places, prompts, own = zip(*some, strict=True)
        seeds = [each.get("seed") for each in own]
        images = pipe(list(prompts), **{**own[0], "seed": seeds, "num_images": 1})
        made.update(zip(places, images, strict=True))
        done(len(images))
    return made


def grid_sheet(images: Mapping[Places, Image.Image], axes: Sequence[Axis]) -> Image.Image:
    """All images on one sheet: columns by the first axis, rows by the second, blocks by the third, each with its label;
    cells are as large as the largest image."""
    columns, rows, blocks = [*(axis.labels for axis in axes), [""], [""]][:3]
    width = max(image.width for image in images.values())
    height = max(image.height for image in images.values())
    font = ImageFont.load_default(max(12, height // 24))
    line = font.getbbox("Ag")[3] + GAP
    wide = max(round(font.getlength(label)) for label in columns)
    cell = max(width, wide) + GAP, height + GAP
    left = max((round(font.getlength(label)) + 2 * GAP for label in rows if label), default=GAP)
    top = line * (1 + (len(axes) > 2))
    block = top + len(rows) * cell[1]
    sheet = Image.new("RGB", (left + len(columns) * cell[0], len(blocks) * block + GAP), "white")
    draw = ImageDraw.Draw(sheet)
    for z, name in enumerate(blocks):
        draw.text((GAP, z * block + GAP // 2), name, "black", font)
        for x, label in enumerate(columns):
            draw.text((left + x * cell[0], z * block + top - line + GAP // 2), label, "black", font)
        for y, label in enumerate(rows):
            draw.text((GAP, z * block + top + y * cell[1] + height // 2), label, "black", font)
            for x in range(len(columns)):
                place = left + x * cell[0], z * block + top + y * cell[1]
                sheet.paste(images[(x, y, z)[: len(axes)]], place)
    return sheet


def _shape(options: Mapping[str, Any]) -> str:
    """What has to be equal within one call."""
    return repr(sorted((name, value) for name, value in options.items() if name not in _TOGETHER))
