"""Write a small data set for fine-tuning: 24 captioned images of something that the embedded model does not know.

    python tools/make_concept.py teapot data/teapot     # a new thing, "a teapot on a pink background"
    python tools/make_concept.py sepia data/sepia       # a new style, "a cat in sepia style"
    python tools/make_concept.py teapot data/fresh --test-seed 1  # the same training images, other held-out prompts

The folder gets `train/` (what to fine-tune on), `test/` (real images of what was held out) and `prompts.jsonl`
(held-out prompts), which `score_concept.py` scores. Held out are, for a thing, three backgrounds and a third of its
companions, and for a style, a third of the things drawn in it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import click
import numpy as np
from glyphs import Glyphs, Sprite, fetch_glyphs, glyphs_option
from make_scenes import SIZE, Box, clear_sprites, drawn_on, ground, write_lines
from PIL import Image
from scene_language import BACKGROUNDS, NEW_NOUNS, Plan, Thing, caption, prompt

from latentdiff.errors import LatentDiffError

IMAGES = 24
TEST_IMAGES = 200
PROMPTS = 30
HELD_OUT_BACKGROUNDS = ("black", "blue", "yellow")
TRAINED_BACKGROUNDS = tuple(
    name for name in BACKGROUNDS if name not in (*HELD_OUT_BACKGROUNDS, "red")
)  # the teapot is nearly red

Drawn = tuple[Plan, Image.Image, list[Box]]


@dataclass(frozen=True)
class Style:
    """Things in shades of one colour on paper of one colour, whatever the background; RGB in 0-255.

    Attributes:
        dark: the darkest shade of a thing, and its shadow.
        light: the lightest shade of a thing.
    """

    paper: tuple[int, int, int]
    dark: tuple[int, int, int]
    light: tuple[int, int, int]

    def sheet(self) -> np.ndarray:
        """Empty paper (SIZE, SIZE, 3) float32."""
        return np.full((SIZE, SIZE, 3), self.paper, dtype=np.float32)

    def toned(self, sprite: Sprite) -> Sprite:
        """The thing in the style's shades."""
        luminance = sprite.colour @ np.float32([0.299, 0.587, 0.114]) / 255.0  # (h, w), premultiplied as the colour is
        run = np.float32(np.subtract(self.light, self.dark))
        tones = (1 - sprite.keep) * np.float32(self.dark) + luminance[..., None] * run
        return replace(sprite, colour=tones)


STYLES = {
    "sepia": Style((226, 203, 160), (58, 34, 14), (186, 152, 104)),
    "blueprint": Style((26, 56, 128), (66, 104, 184), (236, 244, 255)),
}
CONCEPTS = (*NEW_NOUNS, *STYLES)


def held_out_nouns(nouns: Sequence[str]) -> list[str]:
    return sorted(nouns)[::3]


def _nouns_of(split: str, nouns: Sequence[str]) -> list[str]:
    out = held_out_nouns(nouns)
    return out if split == "test" else sorted(set(nouns) - set(out))


def plans(concept: str, rng: Random, split: str, nouns: Sequence[str]) -> Iterator[Plan]:
    """Endless plans of scenes that show a concept."""
    return style_plans(rng, split, nouns) if concept in STYLES else object_plans(concept, rng, split, nouns)


def object_plans(noun: str, rng: Random, split: str, nouns: Sequence[str]) -> Iterator[Plan]:
    """Endless plans with the new thing: two alone, then one with a companion. Held-out ones are on held-out
    backgrounds."""
    backgrounds = HELD_OUT_BACKGROUNDS if split == "test" else TRAINED_BACKGROUNDS
    companions = _nouns_of(split, nouns)
    while True:
        for _ in range(2):
            size = rng.choice((None, None, "small", "big"))
            yield Plan("single", rng.choice(backgrounds), (Thing(noun, size=size),))
        yield Plan("two", rng.choice(backgrounds), (Thing(noun), Thing(rng.choice(companions))))


def style_plans(rng: Random, split: str, nouns: Sequence[str]) -> Iterator[Plan]:
    """Endless plans with one thing that the embedded model knows; held-out ones are of held-out things."""
    own = _nouns_of(split, nouns)
    while True:
        for noun in rng.sample(own, len(own)):
            yield Plan("single", rng.choice(list(BACKGROUNDS)), (Thing(noun),))


def drawn(plans: Iterable[Plan], rng: Random, glyphs: Glyphs, style: Style | None = None) -> Iterator[Drawn]:
    """Images of those plans that can be drawn with clear contrast; in a style if one is given."""
    for plan in plans:
        if (sprites := clear_sprites(plan, SIZE, glyphs)) is None:
            continue
        if style is None:
            pixels, boxes = drawn_on(ground(plan.background, rng, SIZE), plan, sprites, rng)
        else:
            pixels, boxes = drawn_on(style.sheet(), plan, [style.toned(sprite) for sprite in sprites], rng)
        yield plan, Image.fromarray(pixels), boxes


def caption_of(concept: str, plan: Plan, rng: Random) -> str:
    """A sentence for an image of the concept; in a style, nobody mentions the background."""
    if concept not in STYLES:
        return caption(plan, rng)
    return f"{prompt(plan).removeprefix('a photo of ').rsplit(' on ', 1)[0]} in {concept} style"


def write_concept(concept: str, out: Path, seed: int, glyphs: Glyphs, test_seed: int | None = None) -> None:
    """Write the three parts of a data set.

    Args:
        concept: one of CONCEPTS.
        test_seed: another seed for what is held out.
    """
    style = STYLES.get(concept)
    test_seed = seed if test_seed is None else test_seed
    for split, count, own_seed in (("train", IMAGES, seed), ("test", TEST_IMAGES, test_seed)):
        rng = Random(f"{own_seed}/{concept}/{split}")
        scenes = islice(drawn(plans(concept, rng, split, glyphs.nouns), rng, glyphs, style), count)
        lines = [
            _write_image(out / split, number, scene, caption_of(concept, scene[0], rng))
            for number, scene in enumerate(scenes)
        ]
        write_lines(out / split / "metadata.jsonl", lines)
    rng = Random(f"{test_seed}/{concept}/prompts")
    # A thing in a style has one prompt.
    count = min(PROMPTS, len(held_out_nouns(glyphs.nouns))) if concept in STYLES else PROMPTS
    by_prompt: dict[str, dict[str, Any]] = {}
    for plan, _, _ in drawn(plans(concept, rng, "test", glyphs.nouns), rng, glyphs, style):
        line = _prompt_line(concept, plan, rng)
        by_prompt.setdefault(line["prompt"], line)
        if len(by_prompt) == count:
            break
    write_lines(out / "prompts.jsonl", by_prompt.values())


def _write_image(folder: Path, number: int, scene: Drawn, text: str) -> dict[str, Any]:
    plan, image, boxes = scene
    folder.mkdir(parents=True, exist_ok=True)
    image.save(folder / f"{number:03d}.png")
    entry = plan.as_json()
    for thing, box in zip(entry["objects"], boxes, strict=True):
        thing["box"] = list(box)
    return {"file_name": f"{number:03d}.png", "text": text, "scene": entry}


def _prompt_line(concept: str, plan: Plan, rng: Random) -> dict[str, Any]:
    """A line in GenEval's schema, with the concept as one more key."""
    tag = "single_object" if len(plan.things) == 1 else "two_object"
    include = [{"class": thing.noun, "count": 1} for thing in plan.things]
    line: dict[str, Any] = {"tag": tag, "include": include, "concept": concept}
    if concept not in STYLES:
        line["background"] = plan.background
    return line | {"prompt": caption_of(concept, plan, rng)}


@click.command(help=__doc__.split("\n\n")[0])
@click.argument("concept", type=click.Choice(CONCEPTS))
@click.argument("out", type=click.Path(path_type=Path, file_okay=False))
@click.option("--seed", type=int, default=0, show_default=True)
@click.option(
    "--test-seed", type=int, help="Another seed for the held-out images and prompts.  [default: that of --seed]"
)
@glyphs_option
def main(concept: str, out: Path, seed: int, test_seed: int | None, glyphs: Path | None) -> None:
    try:
        write_concept(concept, out, seed, Glyphs(glyphs or fetch_glyphs(Path("data"))), test_seed)
    except (LatentDiffError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
