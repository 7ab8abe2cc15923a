"""Write a small data set for fine-tuning: 24 captioned images of something that the embedded model does not know.

    python tools/make_concept.py object data/teapot     # a new thing, "a teapot on a pink background"
    python tools/make_concept.py style data/sepia       # a new style, "a cat in sepia style"
    python tools/make_concept.py object data/fresh --test-seed 1  # the same training images, other held-out prompts

The folder gets `train/` (what to fine-tune on), `test/` (real images of what was held out) and `prompts.jsonl`
(held-out prompts), which `score_concept.py` scores. Held out are, for the object, three backgrounds and a third of its
companions, and for the style, a third of the things drawn in it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import click
import numpy as np
from glyphs import Glyphs, Sprite, fetch_glyphs, glyphs_option
from make_scenes import SIZE, clear_sprites, compose, drawn_on, write_lines
from PIL import Image
from scene_language import BACKGROUNDS, NEW_NOUNS, Plan, Thing, caption, prompt

from latentdiff.errors import LatentDiffError

OBJECT = next(iter(NEW_NOUNS))
STYLE = "sepia"
PAPER = (226, 203, 160)
INK = (58, 34, 14)
LIGHT = (186, 152, 104)  # the lightest shade of a thing

IMAGES = 24
TEST_IMAGES = 200
PROMPTS = 30
HELD_OUT_BACKGROUNDS = ("black", "blue", "yellow")
TRAINED_BACKGROUNDS = tuple(
    name for name in BACKGROUNDS if name not in (*HELD_OUT_BACKGROUNDS, "red")
)  # the teapot is nearly red

Drawn = tuple[Plan, Image.Image, list[tuple[int, int, int, int]]]


def held_out_nouns(nouns: Sequence[str]) -> list[str]:
    return sorted(nouns)[::3]


def _nouns_of(split: str, nouns: Sequence[str]) -> list[str]:
    out = held_out_nouns(nouns)
    return out if split == "test" else sorted(set(nouns) - set(out))


def object_plans(rng: Random, split: str, nouns: Sequence[str]) -> Iterator[Plan]:
    """Endless plans with the new object: two alone, then one with a companion. Held-out ones are on held-out
    backgrounds."""
    backgrounds = HELD_OUT_BACKGROUNDS if split == "test" else TRAINED_BACKGROUNDS
    companions = _nouns_of(split, nouns)
    while True:
        for _ in range(2):
            size = rng.choice((None, None, "small", "big"))
            yield Plan("single", rng.choice(backgrounds), (Thing(OBJECT, size=size),))
        yield Plan("two", rng.choice(backgrounds), (Thing(OBJECT), Thing(rng.choice(companions))))


def style_plans(rng: Random, split: str, nouns: Sequence[str]) -> Iterator[Plan]:
    """Endless plans with one thing that the embedded model knows; held-out ones are of held-out things."""
    own = _nouns_of(split, nouns)
    while True:
        for noun in rng.sample(own, len(own)):
            yield Plan("single", rng.choice(list(BACKGROUNDS)), (Thing(noun),))


def drawn(plans: Iterable[Plan], rng: Random, glyphs: Glyphs, *, sepia: bool = False) -> Iterator[Drawn]:
    """Images of those plans that can be drawn with clear contrast; in sepia, whatever the background, on paper."""
    for plan in plans:
        if sepia and (sprites := clear_sprites(plan, SIZE, glyphs)) is not None:
            paper = np.full((SIZE, SIZE, 3), PAPER, dtype=np.float32)
            scene = drawn_on(paper, plan, [in_sepia(sprite) for sprite in sprites], rng)
        else:
            scene = None if sepia else compose(plan, rng, SIZE, glyphs)
        if scene is not None:
            yield plan, Image.fromarray(scene[0]), scene[1]


def in_sepia(sprite: Sprite) -> Sprite:
    """The thing in shades of one brown, its shadow in ink."""
    luminance = sprite.colour @ np.float32([0.299, 0.587, 0.114]) / 255.0  # (h, w), premultiplied as the colour is
    tones = (1 - sprite.keep) * np.float32(INK) + luminance[..., None] * np.float32(np.subtract(LIGHT, INK))
    return replace(sprite, colour=tones)


def style_caption(plan: Plan) -> str:
    """A sentence for an image in the style; its background is the paper, which nobody mentions."""
    return f"{prompt(plan).removeprefix('a photo of ').rsplit(' on ', 1)[0]} in {STYLE} style"


def write_concept(kind: str, out: Path, seed: int, glyphs: Glyphs, test_seed: int | None = None) -> None:
    """Write the three parts of a data set; `kind` is "object" or "style", `test_seed` another seed for what is held
    out."""
    plans = object_plans if kind == "object" else style_plans
    sepia = kind == "style"
    test_seed = seed if test_seed is None else test_seed
    for split, count, own_seed in (("train", IMAGES, seed), ("test", TEST_IMAGES, test_seed)):
        rng = Random(f"{own_seed}/{kind}/{split}")
        lines = []
        for number, scene in enumerate(islice(drawn(plans(rng, split, glyphs.nouns), rng, glyphs, sepia=sepia), count)):
            text = caption(scene[0], rng) if kind == "object" else style_caption(scene[0])
            lines.append(_write_image(out / split, number, scene, text))
        write_lines(out / split / "metadata.jsonl", lines)
    rng = Random(f"{test_seed}/{kind}/prompts")
    count = min(PROMPTS, len(held_out_nouns(glyphs.nouns))) if sepia else PROMPTS  # a thing in sepia has one prompt
    by_prompt: dict[str, dict[str, Any]] = {}
    for plan, _, _ in drawn(plans(rng, "test", glyphs.nouns), rng, glyphs, sepia=sepia):
        line = _prompt_line(kind, plan, rng)
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


def _prompt_line(kind: str, plan: Plan, rng: Random) -> dict[str, Any]:
    """A line in GenEval's schema, with the style as one more key."""
    tag = "single_object" if len(plan.things) == 1 else "two_object"
    line: dict[str, Any] = {"tag": tag, "include": [{"class": thing.noun, "count": 1} for thing in plan.things]}
    if kind == "style":
        return line | {"style": STYLE, "prompt": style_caption(plan)}
    return line | {"background": plan.background, "prompt": caption(plan, rng)}


@click.command(help=__doc__.split("\n\n")[0])
@click.argument("kind", type=click.Choice(["object", "style"]))
@click.argument("out", type=click.Path(path_type=Path, file_okay=False))
@click.option("--seed", type=int, default=0, show_default=True)
@click.option(
    "--test-seed", type=int, help="Another seed for the held-out images and prompts.  [default: that of --seed]"
)
@glyphs_option
def main(kind: str, out: Path, seed: int, test_seed: int | None, glyphs: Path | None) -> None:
    try:
        write_concept(kind, out, seed, Glyphs(glyphs or fetch_glyphs(Path("data"))), test_seed)
    except (LatentDiffError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
