"""Score a fine-tuned model on what it should have learned, and on what it knew before.

    python tools/score_concept.py data/teapot --lora runs/teapot/lora.safetensors
    python tools/score_concept.py data/sepia --model runs/sepia/model

Images of the held-out prompts, before and after, are shown to a judge that knows the new things and styles
(`concept_judge.py`: trained on renders only, it shares no weights with the model). Beside the share of right images
stand the judge's own score on real held-out images, on their reconstructions by the VAE, and how often it sees the
new where it is not. Then both models take `latentdiff evaluate`'s old tasks with the same seeds. The interval of the
change is a bootstrap over prompts of the difference of each.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

import click
import numpy as np
from concept_judge import load_concept_judge, strange_images
from glyphs import Glyphs, fetch_glyphs, glyphs_option
from make_concept import STYLES
from PIL import Image
from tqdm import tqdm

from latentdiff.checkpoints.embedded import embedded_judge
from latentdiff.cli.loras import parse_scaled
from latentdiff.errors import DataError, LatentDiffError
from latentdiff.evaluation.judge import Judge, Verdict
from latentdiff.evaluation.prompts import TASKS, read_prompts
from latentdiff.evaluation.protocol import SEEDS_APART, Result, Score, score_prompts
from latentdiff.evaluation.statistics import bootstrap_interval
from latentdiff.files import atomic_path
from latentdiff.image import contact_sheet, open_image, save_png, to_pil, to_tensor
from latentdiff.pipeline import Pipeline

_SHOWN = 8  # images of each sheet
_KNOWN = 200  # scenes of the known world in which the new must not be seen

Rule = Callable[[Verdict], bool]


def shows(concept: str) -> Rule:
    """Whether an image shows a new thing, or is in a new style."""
    if concept in STYLES:
        return lambda seen: seen.background == concept
    return lambda seen: any(thing.noun == concept for thing in seen.objects)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a JSON lines file.

    Raises:
        DataError: there is no such file.
    """
    if not path.is_file():
        raise DataError(f"expected a folder of tools/make_concept.py, found no {path}")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def share(judge: Judge, images: Sequence[Image.Image], rule: Rule) -> Score:
    """Share of the images for which the rule holds, with its 95 % interval."""
    return Score.of(rule(seen) for seen in judge(images))


def images_of(pipe: Pipeline, prompts: Sequence[str], seeds: int, steps: int, guidance: float | None) -> list[Image.Image]:
    """Images of each prompt in turn; image j of prompt i has seed 1000 i + j."""
    made: list[Image.Image] = []
    for number, prompt in enumerate(tqdm(prompts, unit="prompt", leave=False)):
        own = [SEEDS_APART * number + offset for offset in range(seeds)]
        made += pipe([prompt] * seeds, seed=own, steps=steps, guidance_scale=guidance, progress=False)
    return made


def references(judge: Judge, pipe: Pipeline, data: Path, rule: Rule, glyphs: Glyphs) -> dict[str, Score]:
    """What the judge says of real images: with the new thing or style, and without it."""
    real = [open_image(data / "test" / line["file_name"]) for line in read_lines(data / "test" / "metadata.jsonl")]
    back = [to_pil(pipe.decode(pipe.encode_images(to_tensor([image])).mode()))[0] for image in real]
    return {
        "real held-out images": share(judge, real, rule),
        "reconstructions by the VAE": share(judge, back, rule),
        "seen in scenes of strange things": share(judge, strange_images(_KNOWN, glyphs), rule),
    }


def old_tasks(pipe: Pipeline, per_task: int, seeds: int, steps: int, guidance: float | None) -> Result:
    """The old tasks, by the judge of `latentdiff evaluate`."""
    prompts = read_prompts(limit=per_task)
    return score_prompts(pipe, prompts, seeds_per_prompt=seeds, steps=steps, guidance_scale=guidance)


def change(before: Result, after: Result, tasks: Sequence[str] = TASKS) -> Score:
    """What the mean of the tasks has changed by, on the same prompts and seeds."""
    rights: dict[str, dict[int, list[float]]] = {task: defaultdict(list) for task in tasks}
    for one, other in zip(before.outcomes, after.outcomes, strict=True):
        if one.task in rights:
            rights[one.task][one.number].append(float(other.correct) - float(one.correct))
    groups = [[fmean(each) for each in found.values()] for found in rights.values() if found]
    value = fmean(map(fmean, groups))
    low, high = bootstrap_interval(groups)
    return Score(value, min(low, value), max(high, value), sum(one.task in tasks for one in before.outcomes))


def sheet_of(images: Sequence[Image.Image], prompts: Sequence[str]) -> Image.Image:
    """A few images, evenly chosen, above their prompts."""
    shown = np.linspace(0, len(prompts) - 1, min(_SHOWN, len(prompts))).astype(int)
    return contact_sheet([images[index] for index in shown], [prompts[index] for index in shown])


def table(scores: dict[str, Score]) -> str:
    rows = [
        f"{name:44} {one.value:.3f} [{one.low:.3f}, {one.high:.3f}]  n = {one.images}" for name, one in scores.items()
    ]
    return "\n".join(rows)


@click.command(help=__doc__.split("\n\n")[0])
@click.argument("data", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--lora", help="LoRA file of the fine-tuned model, or FILE:SCALE.")
@click.option("--model", help="Fine-tuned model, as `latentdiff generate --model` takes it.")
@click.option("--base", help="Model before fine-tuning.  [default: the embedded model]")
@click.option("--judge", "judge_folder", type=click.Path(path_type=Path), default=Path("data/concept-judge"), show_default=True,
              help="Folder of the judge; it is trained there if there is none.")  # fmt: skip
@click.option("--seeds", type=click.IntRange(1), default=4, show_default=True, help="Images of each prompt.")
@click.option("--steps", type=click.IntRange(1), default=25, show_default=True)
@click.option("--guidance", type=float, help="Its scale.  [default: the model's]")
@click.option(
    "--old-prompts", type=click.IntRange(0), default=50, show_default=True, help="Of each old task; 0 leaves them out."
)
@glyphs_option
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), help="Folder for scores and sheets of images.")
def main(
    data: Path, lora: str | None, model: str | None, base: str | None, judge_folder: Path, seeds: int, steps: int,
    guidance: float | None, old_prompts: int, glyphs: Path | None, out: Path | None,
) -> None:  # fmt: skip
    if (lora is None) == (model is None):
        raise click.UsageError("name the fine-tuned model by either --lora or --model")
    settings = {"seeds": seeds, "steps": steps, "guidance": guidance}
    try:
        before, after = Pipeline.load(base), Pipeline.load(model or base)
        if lora:
            path, scale = parse_scaled(lora)
            after.load_lora(path, scale=scale)
        source = Glyphs(glyphs or fetch_glyphs(Path("data")))
        judge = load_concept_judge(judge_folder, Judge.load(embedded_judge()), source)
        lines = read_lines(data / "prompts.jsonl")
        rule = shows(lines[0]["concept"])
        prompts = [line["prompt"] for line in lines]
        scores, old = references(judge, before, data, rule, source), {}
        for name, pipe in (("before", before), ("after", after)):
            made = images_of(pipe, prompts, **settings)
            scores[f"held-out prompts, {name}"] = share(judge, made, rule)
            if old_prompts:
                old[name] = old_tasks(pipe, old_prompts, **settings)
                scores[f"old tasks, {name}"] = old[name].mean
            if out:
                save_png(sheet_of(made[::seeds], prompts), out / f"{name}.png", metadata=False)
        if old:
            scores["old tasks, change"] = change(old["before"], old["after"])
        if out:
            with atomic_path(out / "scores.json") as temporary:
                temporary.write_text(json.dumps({name: asdict(one) for name, one in scores.items()}, indent=1) + "\n")
    except (LatentDiffError, OSError) as error:
        sys.exit(f"error: {error}")
    print(table(scores))


if __name__ == "__main__":
    main()
