"""Measure the judge of `latentdiff evaluate` on composed scenes that it was not trained on.

    python tools/score_judge.py weights/judge

Prints how many scenes pass with their own captions and with those of others, and how many single things still do the more
they are damaged (`damages.py`): people call a thing clear up to a severity of 0.3, and melted from 0.6 on.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random

import click
import numpy as np
from damages import GRADED, UNGRADED, layers_of, mixed, sprite_of
from glyphs import Glyphs, Sprite, fetch_glyphs, glyphs_option
from make_scenes import clear_sprites, drawn_on, ground, plan_of_scene
from PIL import Image, ImageFilter
from scene_language import Plan, caption, draw_plan
from tqdm import tqdm

from latentdiff.errors import LatentDiffError
from latentdiff.evaluation.judge import Judge
from latentdiff.evaluation.prompts import TASK_OF_KIND, TASKS, EvaluationPrompt, prompt_of_scene
from latentdiff.evaluation.protocol import Result
from latentdiff.evaluation.references import score, shuffled

SEVERITIES = (0.1, 0.2, 0.3, 0.45, 0.6, 0.8, 1.0)
_SEED = 90_000  # of scenes; none of the judge's training is a number
_SOFT = 1.2  # pixels of blur that the decoder of a good model may leave

Shown = list[tuple[EvaluationPrompt, Image.Image]]


def scenes(count: int, glyphs: Glyphs, size: int) -> Shown:
    """Scenes of the six tasks with what they show."""
    shown: Shown = []
    for index in range(4 * count):
        image, line = plan_of_scene(index, split="test", seed=_SEED, size=size, glyphs=glyphs)
        if line["scene"]["kind"] in TASK_OF_KIND and len(shown) < count:
            shown.append((prompt_of_scene(line["scene"], line["text"]), Image.fromarray(image)))
    return shown


def plans(count: int, glyphs: Glyphs, size: int) -> Iterator[tuple[Plan, list[Sprite], Random]]:
    """Plans of single things, in their own colours or in one."""
    made, rng = 0, Random(f"{_SEED}/single")
    while made < count:
        plan = draw_plan(rng, "test", rng.choice(("single", "colour")), glyphs.nouns)
        if (sprites := clear_sprites(plan, size, glyphs)) is not None:
            made += 1
            yield plan, sprites, rng


def damaged_scenes(kind: str, severity: float, count: int, glyphs: Glyphs, size: int) -> Shown:
    """Single things with one damage of a severity; `mixed` with another thing knows none."""
    noise, shown = np.random.default_rng((_SEED, int(100 * severity))), []
    for plan, (sprite,), rng in plans(count, glyphs, size):
        layers = layers_of(sprite)
        if kind == "mixed":
            other = rng.choice([noun for noun in glyphs.nouns if noun != plan.things[0].noun])
            layers = mixed(layers, layers_of(glyphs.sprite(other, plan.things[0].colour, sprite.side)), noise)
        else:
            layers = (GRADED | UNGRADED)[kind](layers, severity, noise)
        pixels, _ = drawn_on(ground(plan.background, rng, size), plan, [sprite_of(layers, sprite)], rng)
        shown.append((prompt_of_scene(plan.as_json(), caption(plan, rng)), Image.fromarray(pixels)))
    return shown


def passed(judge: Judge, shown: Shown) -> float:
    """The share of images that are right."""
    prompts, images = zip(*shown, strict=True)
    outcomes = score(judge, images, prompts).outcomes
    return sum(one.correct for one in outcomes) / len(outcomes)


def caption_table(judge: Judge, shown: Shown) -> str:
    """Scenes as they are, softened, and with others' captions, by task."""
    prompts, images = zip(*shown, strict=True)
    soft = [image.filter(ImageFilter.GaussianBlur(_SOFT)) for image in images]
    columns: dict[str, Result] = {
        "own captions": score(judge, images, prompts),
        "softened": score(judge, soft, prompts),
        "wrong captions": score(judge, images, shuffled(prompts)),
    }
    rows = ["| | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
    for task, name in TASKS.items():
        found = [result.tasks[task].value for result in columns.values() if task in result.tasks]
        rows += [f"| {name} | " + " | ".join(f"{value:.3f}" for value in found) + " |"] if found else []
    means = " | ".join(f"{result.mean.value:.3f}" for result in columns.values())
    return "\n".join([*rows, f"| mean of tasks | {means} |", _backgrounds(list(columns.values()))])


def _backgrounds(results: Sequence[Result]) -> str:
    return "| background | " + " | ".join(f"{result.background.value:.3f}" for result in results) + " |"


def damage_table(judge: Judge, count: int, glyphs: Glyphs) -> str:
    """The share of single things that pass, by damage and severity."""
    size = judge.config.size
    rows = ["| severity | " + " | ".join(f"{severity:g}" for severity in SEVERITIES) + " |"]
    rows += ["|---|" + "---|" * len(SEVERITIES)]
    for kind in tqdm([*GRADED, *UNGRADED, "mixed"], leave=False):
        graded = SEVERITIES if kind in GRADED else SEVERITIES[-1:]
        shares = [passed(judge, damaged_scenes(kind, severity, count, glyphs, size)) for severity in graded]
        cells = [""] * (len(SEVERITIES) - len(shares)) + [f"{share:.2f}" for share in shares]
        rows.append(f"| {kind} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


@click.command(help=__doc__.split("\n\n")[0])
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
@click.option("--count", type=click.IntRange(1), default=600, show_default=True, help="Scenes.")
@click.option("--damaged", type=click.IntRange(1), default=60, show_default=True, help="Things of each severity.")
@glyphs_option
def main(folder: Path, count: int, damaged: int, glyphs: Path | None) -> None:
    try:
        judge, sprites = Judge.load(folder), Glyphs(glyphs or fetch_glyphs(Path("data")))
        click.echo(caption_table(judge, scenes(count, sprites, judge.config.size)))
        click.echo("\n" + damage_table(judge, damaged, sprites))
    except (LatentDiffError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
