"""Pairs of a right and a wrong image of one prompt, drawn by a model and told apart by the judge of `latentdiff evaluate`.

    python tools/make_pairs.py data/pairs --count 200 --seeds 8
    latentdiff data check data/pairs
    latentdiff finetune --loss dpo --data data/pairs --out runs/dpo

The prompts are captions of the scenes' training split, so that nothing that `latentdiff evaluate` asks for is among them; or
those of a file in GenEval's schema. Each is drawn with several seeds. The first right image goes with the first wrong one, the
second with the second, and so on; of prompts of which all images are right, or none, there is no pair. Images that are there
already are not drawn again, so that a tool that was stopped goes on.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any

import click
from PIL import Image
from scene_language import caption, draw_plan
from tqdm import tqdm

from latentdiff.checkpoints.embedded import embedded_judge
from latentdiff.errors import LatentDiffError, UsageError
from latentdiff.evaluation.judge import Judge, Verdict
from latentdiff.evaluation.prompts import TASK_OF_KIND, TASKS, EvaluationPrompt, prompt_of_scene, read_prompts
from latentdiff.evaluation.protocol import SEEDS_APART, TextToImage, check_words, judged
from latentdiff.files import atomic_path
from latentdiff.image import open_image, save_png
from latentdiff.pipeline import Pipeline

SETTINGS = "drawn.json"  # in the folder: how its images were drawn


def training_prompts(count: int, seed: int, tasks: Sequence[str] = tuple(TASKS)) -> Iterator[EvaluationPrompt]:
    """Captions of scenes of the training split, in equal shares of the tasks, with what their images must show."""
    kinds = [kind for kind, task in TASK_OF_KIND.items() if task in tasks]
    for number in range(count):
        rng = Random(f"{seed}/pairs/{number}")
        plan = draw_plan(rng, "train", kinds[number % len(kinds)])
        asked = prompt_of_scene(plan.as_json(), caption(plan, rng))
        yield EvaluationPrompt(asked.task, asked.text, asked.include, asked.exclude, asked.background, number)


def pairs_of(
    prompt: EvaluationPrompt, names: Sequence[str], seen: Iterable[Verdict], most: int
) -> Iterator[dict[str, Any]]:
    """Rows of the metadata: up to `most` pairs of a right and a wrong image, in the order of their seeds.

    Args:
        names: of the images' files.
        seen: what the judge sees in each.
    """
    outcomes = [judged(prompt, verdict) for verdict in seen]
    both = [outcome.correct and outcome.background for outcome in outcomes]
    right = [name for name, is_right in zip(names, both, strict=True) if is_right]
    wrong = [(name, one) for name, is_right, one in zip(names, both, outcomes, strict=True) if not is_right]
    for preferred, (rejected, outcome) in list(zip(right, wrong, strict=False))[:most]:
        why = "; ".join(outcome.reasons) or f"expected the background {prompt.background}"
        yield {"preferred": preferred, "rejected": rejected, "text": prompt.text, "task": prompt.task, "why": why}


def drawn(
    pipe: TextToImage, prompt: EvaluationPrompt, out: Path, seeds: int, options: dict[str, Any]
) -> tuple[list[str], list[Image.Image]]:
    """Names and images of a prompt, one for each seed; what lies in `out` is not drawn again."""
    names = [f"{prompt.number:05d}-{offset:02d}.png" for offset in range(seeds)]
    missing = [offset for offset, name in enumerate(names) if not (out / name).is_file()]
    if missing:
        own = [SEEDS_APART * prompt.number + offset for offset in missing]
        images = pipe([prompt.text] * len(missing), seed=own, batch_size=len(missing), progress=False, **options)
        for offset, image in zip(missing, images, strict=True):
            save_png(image, out / names[offset])
    return names, [open_image(out / name).convert("RGB") for name in names]


def settle(out: Path, settings: dict[str, Any]) -> None:
    """Write down how the images are drawn.

    Raises:
        UsageError: those that are there were drawn otherwise.
    """
    path = out / SETTINGS
    if path.is_file() and (before := json.loads(path.read_text(encoding="utf-8"))) != settings:
        first = next(key for key in settings if before.get(key) != settings[key])
        raise UsageError(
            f"{out} holds images drawn with {first} {before.get(first)!r}, now it is {settings[first]!r}; choose another folder"
        )
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(settings) + "\n", encoding="utf-8")


def make_pairs(
    out: Path, prompts: Sequence[EvaluationPrompt], pipe: Pipeline, *, seeds: int, most: int, options: dict[str, Any]
) -> tuple[int, int]:
    """Draw, judge and write the pairs; returns how many, and of how many prompts."""
    judge = Judge.load(embedded_judge())
    check_words(prompts, judge)
    asked = [prompt.text for prompt in prompts]
    settle(out, {"model": pipe.model_hash, "prompts": asked, **options})
    rows: list[dict[str, Any]] = []
    for prompt in tqdm(prompts, unit="prompt", mininterval=1.0):
        names, images = drawn(pipe, prompt, out, seeds, options)
        rows += pairs_of(prompt, names, judge(images), most)
    if not rows:
        raise UsageError("no prompt has both right and wrong images; take more prompts or more seeds")
    with atomic_path(out / "metadata.jsonl") as temporary:
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return len(rows), len({row["text"] for row in rows})


@click.command(help=__doc__.split("\n\n")[0])
@click.argument("out", type=click.Path(path_type=Path, file_okay=False))
@click.option("--model", help="As `latentdiff generate` takes it.  [default: the embedded one]")
@click.option("--prompts", type=click.Path(path_type=Path), help="A file in GenEval's schema, in place of own ones.")
@click.option("--count", type=click.IntRange(1), default=200, show_default=True, help="Own prompts.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the own prompts.")
@click.option(
    "--task", "tasks", type=click.Choice(list(TASKS)), multiple=True,
    help="Own prompts of this task; may be repeated.  [default: all]",
)  # fmt: skip
@click.option("--seeds", type=click.IntRange(2, SEEDS_APART), default=8, show_default=True, help="Images of a prompt.")
@click.option("--most", type=click.IntRange(1), default=2, show_default=True, help="Pairs of a prompt, at the most.")
@click.option("--steps", type=click.IntRange(1), default=25, show_default=True)
@click.option("--guidance", type=float, help="Its scale.  [default: the model's]")
@click.option("--sampler", default="ddim", show_default=True)
@click.option("--device", default="auto", show_default=True)
def main(
    out: Path, model: str | None, prompts: Path | None, count: int, seed: int, tasks: tuple[str, ...], seeds: int,
    most: int, steps: int, guidance: float | None, sampler: str, device: str,
) -> None:  # fmt: skip
    try:
        asked = read_prompts(prompts) if prompts else list(training_prompts(count, seed, tasks or tuple(TASKS)))
        options = {"steps": steps, "guidance_scale": guidance, "sampler": sampler}
        pipe = Pipeline.load(model, device=device)
        pairs, of = make_pairs(out, asked, pipe, seeds=seeds, most=most, options=options)
    except (LatentDiffError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"{pairs} pairs of {of} of {len(asked)} prompts in {out}")


if __name__ == "__main__":
    main()
