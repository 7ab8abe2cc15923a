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
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import click
import numpy as np
from make_scenes import compose, find_font, write_lines
from PIL import Image
from scene_language import BACKGROUNDS, NEW_NOUNS, NOUNS, Plan, Thing, caption, prompt

from latentdiff.errors import LatentDiffError

OBJECT = next(iter(NEW_NOUNS))
STYLE = "sepia"
PAPER = (226, 203, 160)
INK = (58, 34, 14)
LIGHT = (186, 152, 104)  # the lightest shade of a thing
SIZE = 96  # pixels per side

IMAGES = 24
TEST_IMAGES = 200
PROMPTS = 30
HELD_OUT_BACKGROUNDS = ("black", "blue", "yellow")
TRAINED_BACKGROUNDS = tuple(
    name for name in BACKGROUNDS if name not in (*HELD_OUT_BACKGROUNDS, "red")
)  # the teapot is red
HELD_OUT_NOUNS = sorted(NOUNS)[::3]

Drawn = tuple[Plan, Image.Image, list[tuple[int, int, int, int]]]


def object_plans(rng: Random, split: str) -> Iterator[Plan]:
    """Endless plans with the new object: two alone, then one with a companion. Held-out ones are on held-out
    backgrounds."""
    held_out = split == "test"
    backgrounds = HELD_OUT_BACKGROUNDS if held_out else TRAINED_BACKGROUNDS
    companions = [noun for noun in sorted(NOUNS) if (noun in HELD_OUT_NOUNS) == held_out]
    while True:
        for _ in range(2):
            size = rng.choice((None, None, "small", "big"))
            yield Plan("single", rng.choice(backgrounds), (Thing(OBJECT, size=size),))
        yield Plan("two", rng.choice(backgrounds), (Thing(OBJECT), Thing(rng.choice(companions))))


def style_plans(rng: Random, split: str) -> Iterator[Plan]:
    """Endless plans with one thing that the embedded model knows; held-out ones are of held-out things."""
    nouns = [noun for noun in sorted(NOUNS) if (noun in HELD_OUT_NOUNS) == (split == "test")]
    while True:
        for noun in rng.sample(nouns, len(nouns)):
            yield Plan("single", rng.choice(list(BACKGROUNDS)), (Thing(noun),))


def drawn(
    plans: Iterable[Plan], rng: Random, font: Path, finish: Callable[[Image.Image], Image.Image] | None
) -> Iterator[Drawn]:
    """Images of those plans that can be drawn with clear contrast; `finish` is the style."""
    for plan in plans:
        if (scene := compose(plan, rng, SIZE, font)) is not None:
            yield plan, finish(scene[0]) if finish else scene[0], scene[1]


def in_sepia(image: Image.Image) -> Image.Image:
    """The image in shades of one brown on tan paper, whatever its plain background was."""
    values = np.asarray(image.convert("RGB"), dtype=np.float64)  # (h, w, 3)
    luminance = values @ (0.299, 0.587, 0.114) / 255.0  # (h, w)
    mask = np.clip(np.abs(values - values[0, 0]).max(-1) / 40.0, 0.0, 1.0)[..., None]  # the corner is never covered
    tones = INK + luminance[..., None] * (np.array(LIGHT) - INK)
    return Image.fromarray((mask * tones + (1 - mask) * PAPER).round().astype(np.uint8))


def style_caption(plan: Plan) -> str:
    """A sentence for an image in the style; its background is the paper, which nobody mentions."""
    return f"{prompt(plan).removeprefix('a photo of ').rsplit(' on ', 1)[0]} in {STYLE} style"


def write_concept(kind: str, out: Path, seed: int, font: Path, test_seed: int | None = None) -> None:
    """Write the three parts of a data set; `kind` is "object" or "style", `test_seed` another seed for what is held
    out."""
    plans, finish = (object_plans, None) if kind == "object" else (style_plans, in_sepia)
    test_seed = seed if test_seed is None else test_seed
    for split, count, own_seed in (("train", IMAGES, seed), ("test", TEST_IMAGES, test_seed)):
        rng = Random(f"{own_seed}/{kind}/{split}")
        lines = []
        for number, scene in enumerate(islice(drawn(plans(rng, split), rng, font, finish), count)):
            text = caption(scene[0], rng) if kind == "object" else style_caption(scene[0])
            lines.append(_write_image(out / split, number, scene, text))
        write_lines(out / split / "metadata.jsonl", lines)
    rng = Random(f"{test_seed}/{kind}/prompts")
    by_prompt: dict[str, dict[str, Any]] = {}
    for plan, _, _ in drawn(plans(rng, "test"), rng, font, finish):
        line = _prompt_line(kind, plan, rng)
        by_prompt.setdefault(line["prompt"], line)
        if len(by_prompt) == PROMPTS:
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
@click.option(
    "--font", type=click.Path(path_type=Path, exists=True, dir_okay=False), help="Path of NotoColorEmoji.ttf."
)
def main(kind: str, out: Path, seed: int, test_seed: int | None, font: Path | None) -> None:
    try:
        write_concept(kind, out, seed, font or find_font(), test_seed)
    except (LatentDiffError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
