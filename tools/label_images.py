"""Ask people which images of a model are right, and how often the judge of `latentdiff evaluate` says the same.

    python tools/label_images.py draw labelled --count 200
    python tools/label_images.py label labelled --sheet 0 --wrong "3 7 12"
    python tools/label_images.py agree labelled --judge weights/judge --write

`draw` makes an image of each of so many held-out prompts and lays them out on numbered sheets, twenty to a sheet. Look at a
sheet and name the images that do not show what their caption asks for, each thing of it clearly; `label` writes down that the
others are right. `agree` picks the judge's threshold on every second image of each task and tells on the others how often both
say the same; --write puts that and the labels beside the judge, where `latentdiff evaluate` finds it. A folder that holds no
more than such a `labels.jsonl` is enough for `draw` to make the same images again.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import click
from PIL import Image
from tqdm import tqdm

from latentdiff.checkpoints.embedded import embedded_judge
from latentdiff.errors import DataError, LatentDiffError, UsageError
from latentdiff.evaluation.agreement import AGREEMENT_NAME, Agreement, best_threshold, right_at
from latentdiff.evaluation.judge import CONFIG_NAME, Judge
from latentdiff.evaluation.prompts import TASKS, EvaluationPrompt, read_prompts
from latentdiff.evaluation.protocol import SEEDS_APART
from latentdiff.files import atomic_path
from latentdiff.image import contact_sheet, open_image, save_png
from latentdiff.pipeline import Pipeline
from latentdiff.reading.json import parse_object
from latentdiff.reading.plain import read_text
from latentdiff.request.plan import customary_guidance

LABELS_NAME = "labels.jsonl"
RIGHT, WRONG = "right", "wrong"
PER_SHEET, COLUMNS, SHOWN_SIDE = 20, 5, 256  # images on a sheet, in a row, and pixels of each
SEED_OFFSET = 500  # from a prompt's first seed; `latentdiff evaluate` takes those below
_BATCH = 10
_LOW = 0.01  # a threshold below all that are tried

Line = dict[str, Any]


def new_lines(prompts: Sequence[EvaluationPrompt], count: int, settings: Line) -> list[Line]:
    """One line for each of the first prompts, the tasks in turn.

    Raises:
        UsageError: there are not so many prompts.
    """
    if count > len(prompts):
        raise UsageError(f"expected --count of at most {len(prompts)}, the number of prompts, found {count}")
    by_task = [[prompt for prompt in prompts if prompt.task == task] for task in TASKS]
    in_turn = [prompt for prompt in chain(*zip_longest(*by_task)) if prompt][:count]
    return [
        prompt.to_json() | {"seed": SEEDS_APART * prompt.number + SEED_OFFSET, "label": None} | settings
        for prompt in in_turn
    ]


def read_lines(folder: Path) -> list[Line]:
    """The lines of a folder's labels.

    Raises:
        DataError: there are none, or one is damaged.
    """
    path = folder / LABELS_NAME
    if not path.is_file():
        raise DataError(f"expected {path}, found nothing; `label_images.py draw` makes it")
    texts = read_text(path, DataError).splitlines()
    lines = [parse_object(text, f"{path} line {place + 1}", DataError) for place, text in enumerate(texts)]
    for place, line in enumerate(lines):
        missing = {"seed", "label", "steps", "guidance_scale", "model_hash"} - set(line)
        if missing or line["label"] not in (RIGHT, WRONG, None):
            expected = f'"label" as "{RIGHT}", "{WRONG}" or null, and a seed and settings'
            raise DataError(f"{path} line {place + 1}: expected {expected}, found {texts[place][:60]!r}")
    return lines


def write_lines(folder: Path, lines: Sequence[Line]) -> None:
    with atomic_path(folder / LABELS_NAME) as temporary:
        temporary.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def image_path(folder: Path, place: int) -> Path:
    return folder / f"{place:04d}.png"


def draw_missing(pipe: Pipeline, folder: Path, lines: Sequence[Line]) -> None:
    """Make those images of the lines that are not in the folder.

    Raises:
        DataError: the lines are about another model.
    """
    if other := [line for line in lines if line["model_hash"] != pipe.model_hash]:
        raise DataError(
            f"expected labels of the model {pipe.model_hash}, found some of {other[0]['model_hash']}; name that with --model"
        )
    missing = [place for place in range(len(lines)) if not image_path(folder, place).is_file()]
    for start in tqdm(range(0, len(missing), _BATCH), unit="batch"):
        places = missing[start : start + _BATCH]
        for steps, guidance in {(lines[place]["steps"], lines[place]["guidance_scale"]) for place in places}:
            own = [p for p in places if (lines[p]["steps"], lines[p]["guidance_scale"]) == (steps, guidance)]
            images = pipe(
                [lines[place]["prompt"] for place in own], seed=[lines[place]["seed"] for place in own],
                steps=steps, guidance_scale=guidance, batch_size=_BATCH, progress=False,
            )  # fmt: skip
            for place, image in zip(own, images, strict=True):
                save_png(image, image_path(folder, place))


def sheets(folder: Path, lines: Sequence[Line]) -> Iterator[Image.Image]:
    """The images in groups, each with its number and caption."""
    for start in range(0, len(lines), PER_SHEET):
        places = range(start, min(start + PER_SHEET, len(lines)))
        images = [_shown(open_image(image_path(folder, place))) for place in places]
        yield contact_sheet(images, [f"{p}: {lines[p]['prompt']}" for p in places], columns=COLUMNS)


def _shown(image: Image.Image) -> Image.Image:
    return image.convert("RGB").resize((SHOWN_SIDE, SHOWN_SIDE), Image.Resampling.BICUBIC)


def compared(judge: Judge, lines: Sequence[Line], images: Sequence[Image.Image]) -> tuple[float, Agreement]:
    """The threshold that suits one half of each task best, and the judge's agreement with people on the other half.

    Raises:
        DataError: fewer than two images are labelled.
    """
    labelled = [place for place, line in enumerate(lines) if line["label"]]
    if len(labelled) < 2:
        raise DataError(f"expected labels, found {len(labelled)} of {len(lines)}; `label_images.py label` writes them")
    prompts = [EvaluationPrompt.from_json(lines[place]) for place in labelled]
    doubtful = Judge(judge.network)
    doubtful.config = replace(judge.config, threshold=_LOW)
    verdicts = doubtful([images[place] for place in labelled])
    seen = [lines[place]["label"] == RIGHT for place in labelled]
    ours, theirs = halves(prompts)
    threshold = best_threshold(_at(prompts, ours), _at(verdicts, ours), _at(seen, ours))
    judged = right_at(threshold, _at(prompts, theirs), _at(verdicts, theirs))
    return threshold, Agreement.of(judged, _at(seen, theirs))


def halves(prompts: Sequence[EvaluationPrompt]) -> tuple[list[int], list[int]]:
    """The places of every second prompt of each task, and those of the others; at least one each of two prompts."""
    # By task: the tasks come in turn, so that every second line would be always the same three of the six.
    by_task = sorted(range(len(prompts)), key=lambda place: list(TASKS).index(prompts[place].task))
    return sorted(by_task[::2]), sorted(by_task[1::2])


def _at(values: Sequence[Any], places: Sequence[int]) -> list[Any]:
    return [values[place] for place in places]


def write_beside_judge(judge_folder: Path, judge: Judge, threshold: float, agreement: Agreement) -> None:
    """Put the threshold into the judge's config, and the agreement beside it."""
    texts = {CONFIG_NAME: replace(judge.config, threshold=threshold).to_json(), AGREEMENT_NAME: agreement.to_json()}
    for name, values in texts.items():
        with atomic_path(judge_folder / name) as temporary:
            temporary.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


@click.group(help=__doc__.split("\n\n")[0])
def main() -> None:
    pass


FOLDER = click.argument("folder", type=click.Path(path_type=Path, file_okay=False))


@main.command(help="Make the images and the sheets.")
@FOLDER
@click.option("--model", metavar="NAME|FOLDER", help="By default the embedded one.")
@click.option("--count", type=click.IntRange(1), default=200, show_default=True, help="Images.")
@click.option("--steps", type=click.IntRange(1), default=25, show_default=True)
@click.option("--guidance", type=float, help="Its scale.  [default: the model's]")
def draw(folder: Path, model: str | None, count: int, steps: int, guidance: float | None) -> None:
    pipe = Pipeline.load(model)
    guidance = guidance or customary_guidance(pipe.schedule)
    settings: Line = {"steps": steps, "guidance_scale": guidance, "model_hash": pipe.model_hash}
    there = (folder / LABELS_NAME).is_file()
    lines = read_lines(folder) if there else new_lines(read_prompts(), count, settings)
    folder.mkdir(parents=True, exist_ok=True)
    write_lines(folder, lines)
    draw_missing(pipe, folder, lines)
    for number, sheet in enumerate(sheets(folder, lines)):
        save_png(sheet, folder / f"sheet-{number:02d}.png")


@main.command(help="Write down which images of a sheet are wrong; the others of the sheet are right.")
@FOLDER
@click.option("--sheet", type=click.IntRange(0), required=True, help="Its number.")
@click.option("--wrong", default="", metavar="NUMBERS", help="Of images, with spaces between.")
def label(folder: Path, sheet: int, wrong: str) -> None:
    lines = read_lines(folder)
    places = range(sheet * PER_SHEET, min((sheet + 1) * PER_SHEET, len(lines)))
    numbers = [int(word) for word in wrong.split() if word.isdecimal()]
    if len(numbers) != len(wrong.split()) or any(number not in places for number in numbers):
        expected = f"numbers from {places.start} to {places.stop - 1} with spaces between"
        raise UsageError(f"expected --wrong of sheet {sheet} to be {expected}, found {wrong!r}")
    for place in places:
        lines[place]["label"] = WRONG if place in numbers else RIGHT
    write_lines(folder, lines)


@main.command(help="Tell how often the judge says what people say.")
@FOLDER
@click.option("--judge", "judge_folder", type=click.Path(path_type=Path), help="By default the embedded one.")
@click.option(
    "--write", is_flag=True, help="Write the threshold, the agreement and the labels into the judge's folder."
)
def agree(folder: Path, judge_folder: Path | None, write: bool) -> None:
    judge_folder = judge_folder or embedded_judge()
    judge, lines = Judge.load(judge_folder), read_lines(folder)
    threshold, agreement = compared(judge, lines, [open_image(image_path(folder, p)) for p in range(len(lines))])
    click.echo(f"threshold {threshold:.2f}: the judge agrees with people on {agreement}")
    if write:
        write_beside_judge(judge_folder, judge, threshold, agreement)
        write_lines(judge_folder, lines)


if __name__ == "__main__":
    try:
        main()
    except (LatentDiffError, OSError) as error:
        sys.exit(f"error: {error}")
