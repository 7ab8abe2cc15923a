"""Score a ControlNet that was trained on layouts: do things stand in the boxes that were asked for?

    python tools/make_scenes.py data/layouts-test --count 200 --split test --seed 6 --layouts
    python tools/score_control.py data/layouts-test --control-model runs/layout/controlnet --sheet layouts.png

Images of held-out captions are made with the hint and without it, from the same seeds, and shown to the judge of
`latentdiff evaluate`, as the scenes themselves are. An asked box is met if something that the judge sees overlaps it by
half of what both cover together (IoU 0.5); a scene, if all of its boxes are and nothing else is seen.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from PIL import Image
from tqdm import tqdm

from latentdiff.adapters.control.model import ControlNet
from latentdiff.checkpoints.embedded import embedded_judge, embedded_model
from latentdiff.errors import DataError, LatentDiffError
from latentdiff.evaluation.judge import Judge, Verdict
from latentdiff.evaluation.protocol import Score
from latentdiff.files import atomic_path
from latentdiff.image import contact_sheet, open_image, save_png
from latentdiff.pipeline import Pipeline

MET = 0.5  # intersection over union
_SHOWN = 6  # scenes on the sheet

Box = Sequence[float]


def read_scenes(folder: Path, count: int) -> list[dict[str, Any]]:
    """The first scenes of a folder that `make_scenes.py --layouts` wrote.

    Raises:
        DataError: there is none.
    """
    path = folder / "metadata.jsonl"
    if not path.is_file():
        raise DataError(f"expected a folder of tools/make_scenes.py --layouts, found no {path}")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()[:count]]


def hint_of(folder: Path, scene: dict[str, Any]) -> Image.Image:
    return open_image((folder / scene["file_name"]).with_suffix(".hint.png"))


def overlap(one: Box, other: Box) -> float:
    """Intersection over union of two boxes (left, top, right, bottom)."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    shared = max(0.0, width) * max(0.0, height)
    areas = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (one, other))
    return shared / (areas - shared)


def met(scene: dict[str, Any], seen: Verdict, size: int, *, named: bool = False) -> list[bool]:
    """For each asked object, whether one is seen in its box, and of its noun if that is asked for."""
    asked = [(thing["noun"], [side / size for side in thing["box"]]) for thing in scene["scene"]["objects"]]
    return [
        any(overlap(box, thing.box) >= MET and (not named or thing.noun == noun) for thing in seen.objects)
        for noun, box in asked
    ]


def scores(scenes: Sequence[dict[str, Any]], images: Sequence[Image.Image], judge: Judge) -> dict[str, Score]:
    """Shares of boxes and scenes that are met."""
    verdicts = judge(images)
    size = images[0].width
    each = [met(scene, seen, size) for scene, seen in zip(scenes, verdicts, strict=True)]
    right = [met(scene, seen, size, named=True) for scene, seen in zip(scenes, verdicts, strict=True)]
    whole = [all(own) and len(own) == len(seen.objects) for own, seen in zip(each, verdicts, strict=True)]
    return {
        "boxes with something in them": Score.of(one for own in each for one in own),
        "boxes with what was asked": Score.of(one for own in right for one in own),
        "scenes with everything in place and nothing else": Score.of(whole),
    }


@click.command(help=__doc__.split("\n\n")[0])
@click.argument("data", type=click.Path(path_type=Path))
@click.option("--control-model", required=True, metavar="FILE|FOLDER", help="What `finetune --method controlnet` made.")
@click.option("--model", metavar="FOLDER", help="The model that it was trained beside; by default the embedded one.")
@click.option("--count", type=click.IntRange(1), default=200, show_default=True, help="Scenes.")
@click.option("--scale", type=float, default=1.0, show_default=True, help="How strongly it acts.")
@click.option("--steps", type=click.IntRange(1), default=25, show_default=True)
@click.option("--guidance", type=float, default=5.0, show_default=True)
@click.option("--sheet", type=click.Path(path_type=Path), help="Write hints and images here.")
@click.option("--out", type=click.Path(path_type=Path), help="Write the figures here, as JSON.")
def main(
    data: Path, control_model: str, model: str | None, count: int, scale: float, steps: int, guidance: float,
    sheet: Path | None, out: Path | None,
) -> None:  # fmt: skip
    try:
        scenes = read_scenes(data, count)
        pipe, network = Pipeline.load(model or embedded_model()), ControlNet.load(control_model)
        judge = Judge.load(embedded_judge())
        hints = [hint_of(data, scene) for scene in scenes]
        made: dict[str, list[Image.Image]] = {"held-out scenes": [open_image(data / s["file_name"]) for s in scenes]}
        for name in ("with the control", "without it"):
            made[name] = []
            for seed, (scene, hint) in enumerate(zip(tqdm(scenes, desc=name, leave=False), hints, strict=True)):
                controls = [network(hint, scale=scale)] if name == "with the control" else None
                made[name] += pipe(
                    scene["text"], seed=seed, steps=steps, guidance_scale=guidance, controls=controls, progress=False
                )
        found = {name: scores(scenes, images, judge) for name, images in made.items()}
        for name, own in found.items():
            click.echo(name)
            for what, score in own.items():
                click.echo(f"  {what}: {score.value:.3f} ({score.low:.3f} to {score.high:.3f}) of {score.images}")
        if sheet:
            rows = list(zip(hints, made["with the control"], made["without it"], scenes, strict=True))[:_SHOWN]
            images = [image for hint, yes, no, _ in rows for image in (hint, yes, no)]
            texts = [text for *_, scene in rows for text in ("hint", scene["text"], "without the hint")]
            save_png(contact_sheet(images, texts, columns=6), sheet)
        if out:
            with atomic_path(out) as temporary:
                report = {name: {what: asdict(score) for what, score in own.items()} for name, own in found.items()}
                temporary.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    except (LatentDiffError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
