"""Compose captioned scenes from Fluent Emoji.

    python tools/make_scenes.py data/scenes --count 100000 --split train --seed 0
    python tools/make_scenes.py data/scenes-test --count 2000 --split test --seed 1
    python tools/make_scenes.py --prompts latentdiff/evaluation/prompts.jsonl

The folder is an image folder as Hugging Face datasets reads it: PNG files and a `metadata.jsonl` with, for each, the
caption (`text`) and the scene itself (`scene`: objects with noun, colour, size, box, and the text by which a close-up of
it goes). Scene i depends on the seed and on i alone. With --layouts, a hint for ControlNets lies beside each image,
NAME.hint.png: where things stand, white on black. A source of glyphs that lacks some nouns makes a smaller world.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cache, partial
from multiprocessing import Pool
from pathlib import Path
from random import Random
from typing import Any

import click
import numpy as np
from glyphs import Glyphs, Sprite, draw, fetch_glyphs, glyphs_option
from PIL import Image, ImageDraw
from scene_language import BACKGROUNDS, NOUNS, PLACES, SIZES, Plan, Thing, caption, draw_plan, prompt
from tqdm import tqdm

from latentdiff.errors import LatentDiffError, UsageError
from latentdiff.files import atomic_path

SIZE = 128  # pixels per side

# Cells stand on a grid of this many pixels, the size of a latent, and mostly half an image apart, a whole number of cells of
# the U-Net's lowest level: a thing then looks the same to it wherever it stands, and is learned from few examples.
GRID = 8
MIN_CONTRAST = 55.0  # smallest distance in RGB between the mean colour of a thing and the background
PER_FOLDER = 1000
_MOST_THINGS = 3  # different ones in a scene

Box = tuple[int, int, int, int]  # left, top, right, bottom

# GenEval's six tasks (Ghosh et al. 2023), and the kind of scene that each is about.
TASKS = {
    "single_object": "single", "two_object": "two", "counting": "counting",
    "colors": "colour", "position": "position", "color_attr": "attribution",
}  # fmt: skip

# A place is painted from the top to the horizon, and from there to the bottom: the colours of both runs.
_PLACES = {
    "meadow": (((120, 190, 245), (205, 233, 252)), ((112, 190, 86), (78, 156, 66))),
    "beach": (((96, 186, 235), (190, 230, 245)), ((246, 222, 164), (230, 196, 128))),
    "snow": (((160, 190, 225), (222, 233, 245)), ((250, 252, 255), (222, 230, 242))),
    "night": (((18, 22, 58), (52, 50, 110)), ((40, 44, 82), (24, 26, 52))),
}
_HORIZON = 0.62
_STARS = 22


def ground(background: str, rng: Random, size: int) -> np.ndarray:
    """An empty image (size, size, 3) float32 in 0-255: a colour, a little lighter above than below, or a place."""
    rows = np.linspace(0.0, 1.0, size, dtype=np.float32)[:, None, None]
    if background in BACKGROUNDS:
        base = np.float32([value + rng.randint(-4, 4) for value in BACKGROUNDS[background]])
        run = base + (255.0 - base) * 0.14 * (1 - rows) - base * 0.10 * rows
        return np.repeat(run.clip(0, 255), size, axis=1)
    (top, haze), (near, low) = np.float32(_PLACES[background])
    sky, floor = rows / _HORIZON, (rows - _HORIZON) / (1 - _HORIZON)
    run = np.where(rows < _HORIZON, top + (haze - top) * sky, near + (low - near) * floor)
    image = np.repeat(run, size, axis=1)
    if background == "night":
        for _ in range(_STARS):
            y, x = int(rng.random() * _HORIZON * 0.9 * size), rng.randrange(size)
            image[y, x] += (255 - image[y, x]) * rng.uniform(0.4, 0.95)
    return image


def contrast(sprite: Sprite, background: str) -> float:
    """Distance in RGB between a thing's mean colour and a background; a place has enough for every thing."""
    return float(np.linalg.norm(sprite.own - BACKGROUNDS[background])) if background in BACKGROUNDS else 255.0


def compose(plan: Plan, rng: Random, size: int, glyphs: Glyphs) -> tuple[np.ndarray, list[Box]] | None:
    """Draw a plan: an image (size, size, 3) uint8 and the box of each thing.

    None where one of the things cannot be told from the background.
    """
    sprites = clear_sprites(plan, size, glyphs)
    return None if sprites is None else drawn_on(ground(plan.background, rng, size), plan, sprites, rng)


def clear_sprites(plan: Plan, size: int, glyphs: Glyphs) -> list[Sprite] | None:
    """The things of a plan, ready to be drawn into an image of `size` pixels; None where one lacks contrast."""
    sprites = sprites_of(plan, size, glyphs)
    return sprites if all(contrast(sprite, plan.background) >= MIN_CONTRAST for sprite in sprites) else None


def sprites_of(plan: Plan, size: int, glyphs: Glyphs) -> list[Sprite]:
    """The things of a plan, ready to be drawn into an image of `size` pixels, whatever is behind them."""
    share = SIZES[plan.things[0].size if len(plan.things) == 1 else "small"]
    side = round(share * size / GRID) * GRID
    return [glyphs.sprite(thing.noun, thing.colour, side) for thing in plan.things]


def drawn_on(canvas: np.ndarray, plan: Plan, sprites: Sequence[Sprite], rng: Random) -> tuple[np.ndarray, list[Box]]:
    """Draw a plan's things onto (size, size, 3) float32 in place; that as uint8, and the box of each thing."""
    boxes = []
    for sprite, (left, top) in zip(sprites, _corners(plan, sprites[0].side, rng, len(canvas)), strict=True):
        draw(canvas, sprite, left, top)
        x0, y0, x1, y1 = sprite.box
        boxes.append((left + x0, top + y0, left + x1, top + y1))
    return canvas.round().astype(np.uint8), boxes


def _corners(plan: Plan, side: int, rng: Random, size: int) -> list[tuple[int, int]]:
    """Left top corners of cells, apart, on the grid, and in the plan's relation.

    What a sentence leaves open is always the same, but for `shift`: one stands in the middle, two side by side in the order
    in which they are named, the third above them, four in the quarters. Where the first steps of sampling had to choose
    among arrangements, a small model drew a mixture of them: four things for three, one thing of two.
    """
    steps = (size - side) // GRID  # of the grid that a cell can move
    far = steps - steps % 2  # from a cell to its neighbour; half an image where it is 16 cells of the grid wide
    shift = rng.choice((0, steps % 2))
    middle, low = far // 2, steps - 1
    in_place = plan.background in PLACES
    match len(plan.things):
        case 1:
            places = [(middle, low if in_place else middle)]
        case 2:
            ends = (far, 0) if plan.relation in ("right of", "below") else (0, far)
            upright = plan.relation in ("above", "below")
            places = [(middle, end) if upright else (end, low if in_place else middle) for end in ends]
        case 3:
            places = [(0, far), (far, far), (middle, 0)]
        case _:
            places = [(0, 0), (far, 0), (0, far), (far, far)]
    return [(GRID * (x + shift), GRID * y) for x, y in places]


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
    painter = ImageDraw.Draw(image)
    for left, top, right, bottom in boxes:
        painter.rectangle((left, top, right - 1, bottom - 1), fill="white")
    return image


def plan_of_scene(
    index: int, *, split: str, seed: int, size: int, glyphs: Glyphs, nouns: Sequence[str] = ()
) -> tuple[np.ndarray, dict[str, Any]]:
    """Scene number `index`: its image (size, size, 3) uint8, and its line of the metadata without the file's name.

    Args:
        nouns: what scenes are made of; without any, all of the glyphs.
    """
    rng = Random(f"{seed}/{split}/{index}")
    while True:
        plan = draw_plan(rng, split, nouns=nouns or glyphs.nouns)
        if (drawn := compose(plan, rng, size, glyphs)) is not None:
            break
    image, boxes = drawn
    scene = plan.as_json()
    text = caption(plan, rng)
    for entry, thing, box in zip(scene["objects"], plan.things, boxes, strict=True):
        entry |= {"box": list(box), "text": text if len(boxes) == 1 else caption(_alone(plan, thing, rng), rng)}
    return image, {"text": text, "scene": scene}


def _alone(plan: Plan, thing: Thing, rng: Random) -> Plan:
    """One thing of a plan by itself, as a close-up shows it."""
    size = rng.choice((None, "small"))
    return Plan("colour" if thing.colour else "single", plan.background, (replace(thing, size=size),))


@cache
def _glyphs(source: Path) -> Glyphs:
    return Glyphs(source)  # one per process


def make_scene(
    index: int, *, out: Path, split: str, seed: int, size: int, source: Path, layouts: bool = False,
    nouns: Sequence[str] = (),
) -> dict[str, Any]:  # fmt: skip
    """Draw scene number `index` into its file; returns its line of the metadata."""
    image, line = plan_of_scene(index, split=split, seed=seed, size=size, glyphs=_glyphs(source), nouns=nouns)
    name = f"{index // PER_FOLDER:04d}/{index:07d}.png"
    (out / name).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(out / name, compress_level=1)
    if layouts:
        boxes = [thing["box"] for thing in line["scene"]["objects"]]
        layout(boxes, size).save((out / name).with_suffix(".hint.png"))
    return {"file_name": name, **line}


def evaluation_prompts(per_task: int, seed: int, glyphs: Glyphs) -> list[dict[str, Any]]:
    """Held-out prompts of each task in GenEval's schema, each of which can be drawn with clear contrast."""
    lines = []
    for task, kind in TASKS.items():
        rng, seen = Random(f"{seed}/prompts/{task}"), set()
        while len(seen) < per_task:
            plan = draw_plan(rng, "test", kind, glyphs.nouns)
            sized = any(thing.size for thing in plan.things)
            if sized or prompt(plan) in seen or compose(plan, rng, SIZE, glyphs) is None:
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


def _chosen(nouns: str, known: Sequence[str]) -> tuple[str, ...]:
    """The nouns of --nouns.

    Raises:
        UsageError: one is not known, or they are too few for a scene.
    """
    chosen = tuple(dict.fromkeys(noun.strip() for noun in nouns.split(",")))
    if unknown := [noun for noun in chosen if noun not in known]:
        raise UsageError(f"expected things of the world for --nouns, such as {known[0]!r}, found {unknown[0]!r}")
    if len(chosen) < _MOST_THINGS:
        raise UsageError(f"expected at least {_MOST_THINGS} things for --nouns, found {len(chosen)}")
    return chosen


@click.command(help=__doc__.split("\n\n")[0])
@click.argument("out", type=click.Path(path_type=Path, file_okay=False), required=False)
@click.option("--count", type=click.IntRange(1), default=100_000, show_default=True, help="Scenes to compose.")
@click.option("--split", type=click.Choice(["train", "test"]), default="train", show_default=True)
@click.option("--size", type=click.IntRange(32), default=SIZE, show_default=True, help="Pixels per side.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--nouns", metavar="A,B,C", help="Make scenes of these things alone, such as those that are drawn badly.")
@click.option("--layouts", is_flag=True, help="Write NAME.hint.png beside each image: where things stand.")
@click.option("--workers", type=click.IntRange(1), default=2, show_default=True, help="Processes.")
@glyphs_option
@click.option(
    "--prompts", type=click.Path(path_type=Path), help="Write the prompts of `latentdiff evaluate` here instead."
)
@click.option("--per-task", type=click.IntRange(1), default=50, show_default=True, help="Prompts per task.")
def main(
    out: Path | None, count: int, split: str, size: int, seed: int, nouns: str | None, layouts: bool, workers: int,
    glyphs: Path | None, prompts: Path | None, per_task: int,
) -> None:  # fmt: skip
    try:
        source = glyphs or fetch_glyphs(Path("data"))
        known = _glyphs(source).nouns  # a fault is found before the work is shared
        if len(known) < len(NOUNS):
            click.echo(f"{source} has {len(known)} of {len(NOUNS)} nouns; the world is these", err=True)
        chosen = _chosen(nouns, known) if nouns else ()
        if prompts:
            write_lines(prompts, evaluation_prompts(per_task, seed, _glyphs(source)))
        elif out is None:
            raise click.UsageError("name the folder to write to")
        else:
            work = partial(
                make_scene, out=out, split=split, seed=seed, size=size, source=source, layouts=layouts, nouns=chosen
            )
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
