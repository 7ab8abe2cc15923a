"""How often inpainting takes a thing out of a scene, or puts another in its place, by the judge: a table and images.

    python tools/make_scenes.py data/scenes-test --count 2000 --split test --seed 1
    python tools/compare_inpainting.py data/scenes-test --count 16 --sheet docs/editing-inpainting.png

Of two things in a held-out scene, the box of one is masked.

"out" is right if the judge sees nothing with its middle in the box, and still sees the other thing outside it. "in" is
right if the judge sees the third thing that was asked for in the box, and still the other outside. No pixel outside the
mask may have changed. The judge has to see both things in the scene itself; scenes where it does not are counted and
left out.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import click
import numpy as np
from editing_measures import read_lines
from PIL import Image
from scene_language import NOUNS, Plan, Thing, prompt
from tqdm import tqdm

from latentdiff.checkpoints.embedded import embedded_judge
from latentdiff.errors import DataError, LatentDiffError
from latentdiff.evaluation.judge import Judge, Verdict
from latentdiff.evaluation.protocol import Score
from latentdiff.image import contact_sheet, open_image, save_png
from latentdiff.pipeline import Pipeline
from latentdiff.tasks import inpaint

MARGIN = 10  # pixels of the mask around the thing: its shadow has to go with it
ON_SHEET = 8  # scenes

Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class Case:
    """A scene, the box of what is to go, and the names in question."""

    source: Image.Image
    box: Box
    gone: str
    kept: str
    new: str
    background: str

    def mask(self) -> Image.Image:
        mask = Image.new("L", self.source.size)
        mask.paste(255, self.box)
        return mask

    def prompt(self, *nouns: str) -> str:
        return prompt(Plan("two" if len(nouns) > 1 else "single", self.background, tuple(map(Thing, nouns))))


def read_cases(folder: Path, count: int, seed: int) -> list[Case]:
    """Scenes of two different things, one of which is to go.

    Raises:
        DataError: there are too few such scenes in `folder`.
    """
    lines = [line for line in read_lines(folder) if line["scene"]["kind"] in ("two", "position")]
    if len(lines) < count:
        raise DataError(f"expected {count} scenes of two things in {folder}, found {len(lines)}")
    rng = Random(seed)
    return [_case(folder, line, rng) for line in rng.sample(lines, count)]


def _case(folder: Path, line: dict[str, Any], rng: Random) -> Case:
    source = open_image(folder / line["file_name"])
    gone, kept = line["scene"]["objects"]
    left, top, right, bottom = gone["box"]
    box = (
        max(0, left - MARGIN), max(0, top - MARGIN),
        min(source.width, right + MARGIN), min(source.height, bottom + MARGIN),
    )  # fmt: skip
    new = rng.choice([noun for noun in NOUNS if noun not in (gone["noun"], kept["noun"])])
    return Case(source, box, gone["noun"], kept["noun"], new, line["scene"]["background"])


def nouns_seen(case: Case, verdict: Verdict, *, inside: bool) -> set[str]:
    """Names of what the judge sees with its middle inside, or outside, of the box."""
    width, height = case.source.size
    left, top, right, bottom = case.box
    seen = set()
    for thing in verdict.objects:
        x, y = (thing.box[0] + thing.box[2]) / 2 * width, (thing.box[1] + thing.box[3]) / 2 * height
        if (left <= x <= right and top <= y <= bottom) == inside:
            seen.add(thing.noun)
    return seen


def keeps(case: Case, verdict: Verdict) -> bool:
    """Whether the other thing is still seen."""
    return case.kept in nouns_seen(case, verdict, inside=False)


def is_out(case: Case, verdict: Verdict) -> bool:
    return not nouns_seen(case, verdict, inside=True) and keeps(case, verdict)


def is_in(case: Case, verdict: Verdict) -> bool:
    return case.new in nouns_seen(case, verdict, inside=True) and keeps(case, verdict)


def unchanged_outside(case: Case, result: Image.Image) -> bool:
    outside = np.asarray(case.mask()) == 0
    return np.array_equal(np.asarray(result)[outside], np.asarray(case.source.convert("RGB"))[outside])


def seen_before(cases: list[Case], judge: Judge) -> list[Case]:
    """The cases in which the judge sees both things where they are."""
    verdicts = judge([case.source for case in cases])
    return [
        case
        for case, seen in zip(cases, verdicts, strict=True)
        if case.gone in nouns_seen(case, seen, inside=True) and keeps(case, seen)
    ]


@dataclass(frozen=True)
class Way:
    """One way to inpaint."""

    name: str
    is_right: Callable[[Case, Verdict], bool]
    prompt: Callable[[Case], str]
    options: dict[str, Any]
    shown: bool = False


WAYS = [
    Way("out: --remove", is_out, lambda case: "", {"remove": True}, shown=True),
    Way("out: --remove, the background named", is_out, lambda case: f"{case.background} background", {"remove": True}),
    Way(
        "out: --remove --strength 0, the fill without the model",
        is_out,
        lambda case: "",
        {"remove": True, "strength": 0.0},
    ),
    Way("out: the whole image named", is_out, lambda case: case.prompt(case.kept), {}),
    Way(
        "in: --only-masked, the thing named",
        is_in,
        lambda case: case.prompt(case.new),
        {"only_masked": True},
        shown=True,
    ),
    Way("in: the thing named", is_in, lambda case: case.prompt(case.new), {}),
    Way("in: the whole image named", is_in, lambda case: case.prompt(case.new, case.kept), {}),
]


@click.command()
@click.argument("scenes", type=click.Path(path_type=Path))
@click.option("--model", help="As for `latentdiff generate`; without it, the embedded one.")
@click.option("--count", type=click.IntRange(1), default=60, show_default=True, help="Scenes.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--steps", type=click.IntRange(1), default=25, show_default=True)
@click.option("--guidance", type=float, default=5.0, show_default=True)
@click.option("--repeats", type=click.IntRange(1), default=1, show_default=True)
@click.option("--sheet", type=click.Path(path_type=Path), help="Write images of the first scenes.")
def main(
    scenes: Path,
    model: str | None,
    count: int,
    seed: int,
    steps: int,
    guidance: float,
    repeats: int,
    sheet: Path | None,
) -> None:
    """Paint things out of SCENES and into them, and print how often that works."""
    pipe, judge = Pipeline.load(model), Judge.load(embedded_judge())
    found = read_cases(scenes, count, seed)
    cases = seen_before(found, judge)
    print(f"the judge sees both things in {len(cases)} of {len(found)} scenes\n\n| inpainting | right |\n|---|---|")
    made: dict[str, list[Image.Image]] = {}
    unchanged: list[bool] = []
    for way in WAYS:
        results = []
        for number, case in enumerate(tqdm(cases, desc=way.name, unit="scene", leave=False)):
            options = {
                "steps": steps,
                "guidance_scale": guidance,
                "repeats": repeats,
                "seed": number,
                "progress": False,
            }
            results += inpaint(pipe, case.source, case.mask(), way.prompt(case), **options, **way.options)
        unchanged += [unchanged_outside(*pair) for pair in zip(cases, results, strict=True)]
        made[way.name] = results
        print_score(way.name, [way.is_right(*pair) for pair in zip(cases, judge(results), strict=True)])
    print_score("outside unchanged", unchanged)
    if sheet:
        out, into = (made[way.name] for way in WAYS if way.shown)
        shown: list[tuple[Image.Image, str]] = []
        for case, *edited in list(zip(cases, out, into, strict=True))[:ON_SHEET]:
            names = ("before", f"without the {case.gone}", f"{case.new} in its place")
            shown += zip((case.source, *edited), names, strict=True)
        images, captions = zip(*shown, strict=True)
        save_png(contact_sheet(images, captions, columns=6), sheet)


def print_score(name: str, values: list[bool]) -> None:
    score = Score.of(values)
    print(f"| {name} | {score.value:.2f} [{score.low:.2f}, {score.high:.2f}] |", flush=True)


if __name__ == "__main__":
    try:
        main()
    except LatentDiffError as error:
        sys.exit(f"error: {error}")
