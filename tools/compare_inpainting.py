"""How often inpainting takes a thing out of a scene, or puts another in its place, by the judge: a table and pictures.

    python tools/make_scenes.py data/scenes-test --count 2000 --split test --seed 1
    python tools/compare_inpainting.py data/scenes-test --count 50 --sheet docs/editing-inpainting.png

Of two things in a held-out scene, the box of one is masked. "out": the prompt names the other alone, and nothing must be seen
in the box. "in": the prompt names a third thing beside the other, which must be seen in the box. In both, the other must still
be seen outside, and no pixel outside the mask may have changed.
"""

from __future__ import annotations

import sys
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

from latentdiff.embedded import embedded_judge
from latentdiff.errors import DataError, LatentDiffError
from latentdiff.evaluation.judge import Judge, Verdict
from latentdiff.evaluation.protocol import Score
from latentdiff.image import contact_sheet, open_image, save_png
from latentdiff.pipeline import Pipeline
from latentdiff.tasks import inpaint

MARGIN = 6  # pixels of the mask around the thing
ON_SHEET = 4  # scenes

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


def unchanged_outside(case: Case, result: Image.Image) -> bool:
    outside = np.asarray(case.mask()) == 0
    return np.array_equal(np.asarray(result)[outside], np.asarray(case.source.convert("RGB"))[outside])


@click.command()
@click.argument("scenes", type=click.Path(path_type=Path))
@click.option("--model", help="As for `latentdiff generate`; without it, the embedded one.")
@click.option("--count", type=click.IntRange(1), default=50, show_default=True, help="Scenes.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--steps", type=click.IntRange(1), default=25, show_default=True)
@click.option("--guidance", type=float, default=5.0, show_default=True)
@click.option("--repeats", type=click.IntRange(1), default=1, show_default=True)
@click.option("--sheet", type=click.Path(path_type=Path), help="Write pictures of the first scenes.")
def main(
    scenes: Path, model: str | None, count: int, seed: int, steps: int, guidance: float, repeats: int, sheet: Path | None
) -> None:
    """Paint things out of SCENES and into them, and print how often that works."""
    cases = read_cases(scenes, count, seed)
    pipe, judge = Pipeline.load(model), Judge.load(embedded_judge())
    right: dict[str, list[bool]] = {"out": [], "in": [], "outside unchanged": []}
    shown: list[tuple[Image.Image, str]] = []
    for number, case in enumerate(tqdm(cases, desc="inpainting", unit="scene")):
        options = {"steps": steps, "guidance_scale": guidance, "repeats": repeats, "seed": number, "progress": False}
        out, into = (
            inpaint(pipe, case.source, case.mask(), case.prompt(*nouns), **options)[0]
            for nouns in ((case.kept,), (case.new, case.kept))
        )
        seen_out, seen_in = judge([out, into])
        right["out"].append(not nouns_seen(case, seen_out, inside=True) and keeps(case, seen_out))
        right["in"].append(case.new in nouns_seen(case, seen_in, inside=True) and keeps(case, seen_in))
        right["outside unchanged"].append(all(unchanged_outside(case, result) for result in (out, into)))
        if number < ON_SHEET:
            shown += [(case.source, "before"), (out, f"without the {case.gone}"), (into, f"{case.new} in its place")]
    print("| inpainting | right |\n|---|---|")
    for name, values in right.items():
        score = Score.of(values)
        print(f"| {name} | {score.value:.2f} [{score.low:.2f}, {score.high:.2f}] |")
    if sheet:
        pictures, captions = zip(*shown, strict=True)
        save_png(contact_sheet(pictures, captions, columns=3 * ON_SHEET // 2), sheet)


if __name__ == "__main__":
    try:
        main()
    except LatentDiffError as error:
        sys.exit(f"error: {error}")
