"""What the judge is trained on: scenes composed as they are asked for, many of their things damaged."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from damages import LEAST_CHANGE, MELTED, UNGRADED, change, damaged, layers_of, mixed, sprite_of
from glyphs import Glyphs, Sprite
from make_scenes import clear_sprites, drawn_on, ground
from PIL import Image, ImageFilter
from scene_language import BACKGROUNDS, OBJECT_COLOURS, Plan, Thing, draw_plan

from latentdiff.errors import DataError
from latentdiff.evaluation.network import JudgeConfig
from latentdiff.image import open_image

IGNORED = -100  # a noun or colour that the judge is not asked for; what cross_entropy passes over
SMALLEST_VISIBLE_SHARE = 0.7  # of an object that a shift pushes over the edge and that still counts
FATES = {
    "as it is": 0.2,
    "harmless": 0.34,
    "melted": 0.26,
    "mixed": 0.06,
    "shuffled": 0.04,
    "smudged": 0.06,
    "gone": 0.04,
}

# How often a scene is of which kind. `crowd` is four different things, from which the judge learns most for its time.
KINDS = {"crowd": 0.45, "single": 0.22, "colour": 0.15, "place": 0.06, "position": 0.04, "counting": 0.05, "two": 0.03}
_COLOURED = 0.3  # of the things of a crowd
_KEPT = 64  # scenes, until their second use
_MARGIN = 24  # pixels of ground beyond the border, for scenes that are shifted


@dataclass
class Scene:
    """One image (H, W, 3) uint8 with its objects; `boxes` (K, 4) are left, top, right, bottom in pixels.

    A noun is an index into the judge's, or their number for a thing that is too damaged to be called any of them; colours
    are indices, too, and their number means "its own". Either may be IGNORED.
    """

    pixels: np.ndarray
    background: int
    nouns: np.ndarray  # (K,)
    colours: np.ndarray  # (K,)
    boxes: np.ndarray  # (K, 4)


class Composer:
    """Draws scenes of both splits.

    Args:
        fates: how often a thing meets each of FATES; None is as in training.
    """

    def __init__(self, glyphs: Glyphs, config: JudgeConfig, fates: dict[str, float] | None = None) -> None:
        self.glyphs, self.config = glyphs, config
        self.composed = lru_cache(maxsize=_KEPT)(self._composed)
        self.fates = fates or FATES

    def __call__(self, seed: str) -> Scene:
        """The scene of a seed, at the judge's size."""
        return self.composed(seed)

    def _composed(self, seed: str) -> Scene:
        rng, noise = Random(seed), np.random.default_rng(list(seed.encode()))
        while True:
            plan = self._plan(rng)
            if (sprites := clear_sprites(plan, self.config.size, self.glyphs)) is not None:
                return self.drawn(plan, sprites, rng, noise)

    def _plan(self, rng: Random) -> Plan:
        kind = rng.choices(list(KINDS), list(KINDS.values()))[0]
        if kind != "crowd":
            return draw_plan(rng, rng.choice(("train", "test")), kind, self.glyphs.nouns)
        background = rng.choice(list(BACKGROUNDS))
        colours = [name for name in OBJECT_COLOURS if name != background]
        nouns = rng.sample(self.glyphs.nouns, 4)
        things = (Thing(noun, rng.choice(colours) if rng.random() < _COLOURED else None) for noun in nouns)
        return Plan(kind, background, tuple(things))

    def drawn(
        self, plan: Plan, sprites: Sequence[Sprite], rng: Random, noise: np.random.Generator,
        canvas: np.ndarray | None = None, shown: Callable[[Sprite], Sprite] = lambda sprite: sprite,
    ) -> Scene:  # fmt: skip
        """A plan drawn with things that met their fates.

        Args:
            canvas: (size, size, 3) float32 in 0-255 to draw on, in place of the plan's background.
            shown: what becomes of each thing's look after that.
        """
        fates = rng.choices(list(self.fates), list(self.fates.values()), k=len(sprites))
        met = [self._met(*each, noise) for each in zip(plan.things, sprites, fates, strict=True)]
        canvas = ground(plan.background, rng, self.config.size) if canvas is None else canvas
        pixels, boxes = drawn_on(canvas, plan, [shown(sprite) for sprite, _, _ in met], rng)
        there = np.array([fate != "gone" for fate in fates])
        return Scene(
            pixels,
            self.config.backgrounds.index(plan.background),
            np.array([noun for _, noun, _ in met])[there],
            np.array([colour for _, _, colour in met])[there],
            np.array(boxes, dtype=np.float32)[there],
        )

    def _met(self, thing: Thing, sprite: Sprite, fate: str, noise: np.random.Generator) -> tuple[Sprite, int, int]:
        """What a fate makes of a thing: how it looks, and which noun and colour it has to be called."""
        # What the judge has no name for is as unknown to it as what is melted.
        noun = (*self.config.nouns, thing.noun).index(thing.noun)
        colour = self.config.colours.index(thing.colour) if thing.colour else len(self.config.colours)
        if fate == "as it is":
            return sprite, noun, colour
        before = layers_of(sprite)
        after = self._changed(before, thing, sprite, fate, noise)
        if fate == "harmless":
            return sprite_of(after, sprite), noun, colour
        called = len(self.config.nouns) if change(before, after) >= LEAST_CHANGE else IGNORED
        return sprite_of(after, sprite), called, IGNORED

    def _changed(
        self, before: np.ndarray, thing: Thing, sprite: Sprite, fate: str, noise: np.random.Generator
    ) -> np.ndarray:
        if fate == "gone":
            return np.zeros_like(before)
        if fate in UNGRADED:
            return UNGRADED[fate](before, float(noise.uniform(MELTED, 1.0)), noise)
        if fate == "mixed":
            others = [noun for noun in self.glyphs.nouns if noun != thing.noun]
            other = self.glyphs.sprite(others[noise.integers(len(others))], thing.colour, sprite.side)
            return mixed(before, layers_of(other), noise)
        return damaged(before, fate == "melted", noise)


def augmented(scene: Scene, rng: np.random.Generator) -> Scene:
    """The scene as a generative model might have painted it: shifted, soft, off in colour."""
    image, boxes = _shifted(scene.pixels, scene.boxes, rng)
    inside = np.clip(boxes, 0, len(scene.pixels))
    keep = _areas(inside) > SMALLEST_VISIBLE_SHARE * _areas(boxes)
    values = np.asarray(_softened(image, rng), dtype=np.float32)
    if rng.random() < 0.6:
        values = values * rng.uniform(0.93, 1.07, 3) + rng.uniform(-10, 10, 3)
    if rng.random() < 0.4:
        values = values + rng.normal(0, rng.uniform(1, 10), values.shape)
    pixels = np.clip(values, 0, 255).astype(np.uint8)
    return replace(scene, pixels=pixels, nouns=scene.nouns[keep], colours=scene.colours[keep], boxes=inside[keep])


def batch_of(scenes: Sequence[Scene], step: int, seed: int, size: int) -> list[Scene]:
    """A step's batch of scenes that are in memory, the same whether or not the run was interrupted."""
    rng = np.random.default_rng((seed, step))
    return [augmented(scenes[index], rng) for index in rng.integers(len(scenes), size=size)]


def composed_batch(compose: Composer, step: int, seed: int, size: int) -> list[Scene]:
    """A step's batch of scenes, the same whether or not the run was interrupted; each half is in two batches running."""
    rng = np.random.default_rng((seed, step))
    first = step * (size // 2)
    return [augmented(compose(f"{seed}/{number}"), rng) for number in range(first, first + size)]


def varied(images: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """So many of the images (M, H, W, 3) uint8, moved, mirrored and softened at random."""
    nothing = np.empty(0, dtype=int)
    chosen = images[rng.integers(max(1, len(images)), size=count)]
    mirrored = [image[:, ::-1] if rng.random() < 0.5 else image for image in chosen]
    scenes = [Scene(image, 0, nothing, nothing, np.empty((0, 4), dtype=np.float32)) for image in mirrored]
    return np.stack([augmented(scene, rng).pixels for scene in scenes]) if scenes else chosen


def read_damaged(folder: Path, size: int) -> np.ndarray:
    """Images (M, size, size, 3) uint8 in none of which a thing is clear, such as a half-trained model makes.

    Args:
        folder: image files and a metadata.jsonl with the `file_name` of each; lines whose `label` is "right" are left out.

    Raises:
        DataError: there are none.
    """
    metadata = folder / "metadata.jsonl"
    if not metadata.is_file():
        raise DataError(
            f"expected damaged images in {folder}, found no metadata.jsonl; name a file in each line's file_name"
        )
    lines: list[dict[str, Any]] = [json.loads(line) for line in metadata.read_text(encoding="utf-8").splitlines()]
    wanted = [folder / line["file_name"] for line in lines if line.get("label") != "right"]
    if not wanted:
        raise DataError(f"expected damaged images in {folder}, found {len(lines)} lines and all of them right")
    images = [open_image(path).convert("RGB").resize((size, size), Image.Resampling.BICUBIC) for path in wanted]
    return np.stack([np.asarray(image) for image in images])


def _shifted(pixels: np.ndarray, boxes: np.ndarray, rng: np.random.Generator) -> tuple[Image.Image, np.ndarray]:
    """Scale by up to a tenth and shift by up to eight pixels; the border is drawn out where the image ends."""
    size = len(pixels)
    padded = Image.fromarray(np.pad(pixels, ((_MARGIN, _MARGIN), (_MARGIN, _MARGIN), (0, 0)), mode="edge"))
    scale, (dx, dy) = rng.uniform(0.9, 1.12), rng.uniform(-8, 8, 2)
    start = size / 2 * (1 - 1 / scale) + _MARGIN
    matrix = (1 / scale, 0, start - dx, 0, 1 / scale, start - dy)
    moved = padded.transform((size, size), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)
    offset = np.array([dx, dy, dx, dy], dtype=np.float32)
    return moved, (boxes - size / 2 + offset) * scale + size / 2


def _softened(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    kind = rng.random()
    if kind < 0.3:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 1.3)))
    elif kind < 0.55:
        small = int(rng.uniform(0.45, 1.0) * image.width)
        image = image.resize((small, small), Image.Resampling.BILINEAR).resize(image.size, Image.Resampling.BICUBIC)
    if rng.random() < 0.2:
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=int(rng.uniform(25, 90)))
        image = Image.open(buffer).convert("RGB")
    return image


def _areas(boxes: np.ndarray) -> np.ndarray:
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
