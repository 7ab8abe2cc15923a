"""Compose captioned scenes from the glyphs of the Noto Color Emoji font.

    python tools/make_scenes.py data/scenes --count 60000 --split train --seed 0
    python tools/make_scenes.py data/scenes-test --count 2000 --split test --seed 1
    python tools/make_scenes.py --prompts latentdiff/evaluation/prompts.jsonl

The folder is an image folder as Hugging Face datasets reads it: PNG files and a `metadata.jsonl` with, for each, the
caption (`text`) and the scene itself (`scene`: objects with noun, colour and box). Scene i depends on the seed and on i
alone. With --layouts, a hint for ControlNets lies beside each image, NAME.hint.png: where things stand, white on black.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from functools import cache, partial
from itertools import combinations
from multiprocessing import Pool
from pathlib import Path
from random import Random
from typing import Any

import click
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scene_language import (
    BACKGROUNDS,
    NEW_NOUNS,
    NOUNS,
    OBJECT_COLOURS,
    SIZES,
    SIZES_BY_COUNT,
    Plan,
    caption,
    draw_plan,
    prompt,
)
from tqdm import tqdm

from latentdiff.errors import LatentDiffError, MissingDependencyError
from latentdiff.files import atomic_path

FONT_NAME = "NotoColorEmoji.ttf"
FONT_FOLDERS = ("/usr/share/fonts", "/usr/local/share/fonts", "~/.local/share/fonts", "~/.fonts", "/Library/Fonts")
FONT_SIZE = 109  # the only size of the font's bitmaps

# Cells stand on a grid of this many pixels, the size of a latent: an object then looks the same in the latent space
# wherever it stands, which lets a small model learn it from few examples.
GRID = 8
MARGIN = 2  # pixels between an object and the border of its cell, so that objects never touch
MIN_CONTRAST = 55.0  # smallest mean distance in RGB between an object and the background
PER_FOLDER = 1000

Box = tuple[int, int, int, int]  # left, top, right, bottom

# GenEval's six tasks (Ghosh et al. 2023), and the kind of scene that each is about.
TASKS = {
    "single_object": "single", "two_object": "two", "counting": "counting",
    "colors": "colour", "position": "position", "color_attr": "attribution",
}  # fmt: skip


def find_font() -> Path:
    """The emoji font.

    Raises:
        MissingDependencyError: it is not installed in one of the usual places.
    """
    for folder in FONT_FOLDERS:
        for path in sorted(Path(folder).expanduser().rglob(FONT_NAME)):
            return path
    raise MissingDependencyError(
        f"the emoji font {FONT_NAME} was not found in {', '.join(FONT_FOLDERS)};"
        " install it (Debian, Ubuntu: apt-get install fonts-noto-color-emoji) or name it with --font"
    )


@cache
def glyph(noun: str, colour: str | None, font: Path) -> Image.Image:
    """A noun's emoji, or an emoji itself, cut to its outline, in its own colours or in shades of one; premultiplied
    RGBa."""
    canvas = Image.new("RGBA", (2 * FONT_SIZE, 2 * FONT_SIZE))
    try:
        face = ImageFont.truetype(str(font), FONT_SIZE)
    except OSError as error:
        raise MissingDependencyError(f"{font} is not a usable colour emoji font: {error}") from error
    ImageDraw.Draw(canvas).text((20, 20), (NOUNS | NEW_NOUNS).get(noun, noun), font=face, embedded_color=True)
    image = canvas.crop(canvas.getbbox())
    return (tinted(image, OBJECT_COLOURS[colour]) if colour else image).convert("RGBa")


def tinted(image: Image.Image, colour: tuple[int, int, int]) -> Image.Image:
    """The image in shades of one colour: its luminance runs from a dark shade through the colour to a light one."""
    pixels = np.asarray(image, dtype=np.float64)
    luminance = pixels[..., :3] @ (0.299, 0.587, 0.114) / 255.0  # (h, w)
    middle = np.array(colour, dtype=np.float64)
    shades = np.stack([0.25 * middle, middle, middle + 0.6 * (255.0 - middle)])  # dark, plain, light
    ramp = np.stack([np.interp(luminance, (0.0, 0.55, 1.0), shades[:, channel]) for channel in range(3)], axis=-1)
    return Image.fromarray(np.concatenate([ramp, pixels[..., 3:]], axis=-1).round().astype(np.uint8))


def contrast(image: Image.Image, background: tuple[int, int, int]) -> float:
    """Mean distance in RGB between the opaque part of a glyph and a background."""
    pixels = np.asarray(image.convert("RGBA"), dtype=np.float64)
    distance = np.linalg.norm(pixels[..., :3] - background, axis=-1)
    weight = pixels[..., 3]
    return float((distance * weight).sum() / weight.sum())


def compose(plan: Plan, rng: Random, size: int, font: Path) -> tuple[Image.Image, list[Box]] | None:
    """Draw a plan; None where the objects cannot be told from the background or found no place."""
    ground = tuple(min(255, max(0, value + rng.randint(-4, 4))) for value in BACKGROUNDS[plan.background])
    glyphs = [glyph(thing.noun, thing.colour, font) for thing in plan.things]
    if any(contrast(image, ground) < MIN_CONTRAST for image in set_of(glyphs)):
        return None
    alone = len(plan.things) == 1
    share = rng.choice(SIZES[plan.things[0].size] if alone else SIZES_BY_COUNT[len(plan.things)])
    side = round(share * size / GRID) * GRID
    cells = _place(len(plan.things), side, plan.relation, rng, size)
    if cells is None:
        return None
    scene, boxes = Image.new("RGB", (size, size), ground), []
    for image, (left, top) in zip(glyphs, cells, strict=True):
        fitted = _fit(image, side - 2 * MARGIN).convert("RGBA")
        left, top = left + (side - fitted.width) // 2, top + (side - fitted.height) // 2
        scene.paste(fitted, (left, top), fitted)
        boxes.append((left, top, left + fitted.width, top + fitted.height))
    return scene, boxes


def set_of(images: Iterable[Image.Image]) -> list[Image.Image]:
    """Different images only; copies of a noun share one."""
    return list({id(image): image for image in images}.values())


def _fit(image: Image.Image, side: float) -> Image.Image:
    factor = side / max(image.size)
    width, height = (max(1, round(length * factor)) for length in image.size)
    return image.resize((width, height), Image.Resampling.LANCZOS)


def _place(count: int, side: int, relation: str | None, rng: Random, size: int) -> list[tuple[int, int]] | None:
    """Left top corners of cells that lie inside the image, apart, and in the relation, by rejection."""
    for _ in range(400):
        corners = [tuple(GRID * rng.randint(0, (size - side) // GRID) for _ in "xy") for _ in range(count)]
        apart = all(max(abs(a[0] - b[0]), abs(a[1] - b[1])) >= side for a, b in combinations(corners, 2))
        boxes = [(left, top, left + side, top + side) for left, top in corners]
        if apart and (relation is None or relation_holds(relation, *boxes)):
            return corners
    return None


def relation_holds(relation: str, a: Box, b: Box) -> bool:
    """Whether `a` stands clearly in the relation to `b`: that way more than across, and apart on that axis."""
    dx, dy = (b[0] + b[2] - a[0] - a[2]) / 2, (b[1] + b[3] - a[1] - a[3]) / 2
    along, across = (dx, dy) if relation in ("left of", "right of") else (dy, dx)
    if relation in ("right of", "below"):
        along = -along
    return along > 1.3 * abs(across) and along > 10


def layout(boxes: Sequence[Box], size: int) -> Image.Image:
    """Where things stand: their boxes, white on black."""
    image = Image.new("RGB", (size, size))
    draw = ImageDraw.Draw(image)
    for left, top, right, bottom in boxes:
        draw.rectangle((left, top, right - 1, bottom - 1), fill="white")
    return image


def make_scene(
    index: int, *, out: Path, split: str, seed: int, size: int, font: Path, layouts: bool = False
) -> dict[str, Any]:
    """Draw scene number `index` into its file; returns its line of the metadata."""
    rng = Random(f"{seed}/{split}/{index}")
    while True:
        plan = draw_plan(rng, split)
        if (drawn := compose(plan, rng, size, font)) is not None:
            break
    image, boxes = drawn
    name = f"{index // PER_FOLDER:04d}/{index:07d}.png"
    (out / name).parent.mkdir(parents=True, exist_ok=True)
    image.save(out / name, compress_level=1)
    if layouts:
        layout(boxes, size).save((out / name).with_suffix(".hint.png"))
    scene = plan.as_json()
    for entry, box in zip(scene["objects"], boxes, strict=True):
        entry["box"] = list(box)
    return {"file_name": name, "text": caption(plan, rng), "scene": scene}


def evaluation_prompts(per_task: int, seed: int, font: Path) -> list[dict[str, Any]]:
    """Held-out prompts of each task in GenEval's schema, each of which can be drawn with clear contrast."""
    lines = []
    for task, kind in TASKS.items():
        rng, seen = Random(f"{seed}/prompts/{task}"), set()
        while len(seen) < per_task:
            plan = draw_plan(rng, "test", kind)
            sized = any(thing.size for thing in plan.things)
            if sized or prompt(plan) in seen or compose(plan, rng, 96, font) is None:
                continue
            seen.add(prompt(plan))
            lines.append(_geneval_line(task, plan))
    return lines


def _geneval_line(task: str, plan: Plan) -> dict[str, Any]:
    include = []
    for thing in dict.fromkeys(plan.things):
        entry: dict[str, Any] = {"class": thing.noun, "count": plan.things.count(thing)}
        include.append(entry | ({"color": thing.colour} if thing.colour else {}))
    if plan.relation:
        include.reverse()
        include[1]["position"] = [plan.relation, 0]  # its relation to include[0]
    line: dict[str, Any] = {"tag": task, "include": include, "background": plan.background, "prompt": prompt(plan)}
    if task == "counting":
        line["exclude"] = [{"class": include[0]["class"], "count": include[0]["count"] + 1}]
    return line


def write_lines(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    """Write JSON lines, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


@click.command(help=__doc__.split("\n\n")[0])
@click.argument("out", type=click.Path(path_type=Path, file_okay=False), required=False)
@click.option("--count", type=click.IntRange(1), default=60_000, show_default=True, help="Scenes to compose.")
@click.option("--split", type=click.Choice(["train", "test"]), default="train", show_default=True)
@click.option("--size", type=click.IntRange(32), default=96, show_default=True, help="Pixels per side.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--layouts", is_flag=True, help="Write NAME.hint.png beside each image: where things stand.")
@click.option("--workers", type=click.IntRange(1), default=2, show_default=True, help="Processes.")
@click.option(
    "--font", type=click.Path(path_type=Path, exists=True, dir_okay=False), help="Path of NotoColorEmoji.ttf."
)
@click.option(
    "--prompts", type=click.Path(path_type=Path), help="Write the prompts of `latentdiff evaluate` here instead."
)
@click.option("--per-task", type=click.IntRange(1), default=50, show_default=True, help="Prompts per task.")
def main(
    out: Path | None, count: int, split: str, size: int, seed: int, layouts: bool, workers: int, font: Path | None,
    prompts: Path | None, per_task: int,
) -> None:  # fmt: skip
    try:
        font = font or find_font()
        if prompts:
            write_lines(prompts, evaluation_prompts(per_task, seed, font))
        elif out is None:
            raise click.UsageError("name the folder to write to")
        else:
            work = partial(make_scene, out=out, split=split, seed=seed, size=size, font=font, layouts=layouts)
            with Pool(workers) as pool:
                lines = list(
                    tqdm(pool.imap(work, range(count), chunksize=50), total=count, unit="scene", mininterval=1.0)
                )
            # Last, so that a folder without it is known to be unfinished.
            write_lines(out / "metadata.jsonl", lines)
    except (LatentDiffError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
