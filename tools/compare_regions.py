"""Whether regions place objects and colours better than the prompt alone: a table, by the embedded judge.

    python tools/compare_regions.py --prompts 12 --weights 0.7 1

The prompts are the first ones of `latentdiff evaluate` with a position or with two colours. Each object gets the half of
the image that its prompt asks for, the first one the left half where none is asked for.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from scene_language import Plan, Thing  # noqa: E402
from scene_language import prompt as sentence  # noqa: E402

from latentdiff import Pipeline, Region  # noqa: E402
from latentdiff.checkpoints.embedded import embedded_judge  # noqa: E402
from latentdiff.evaluation.judge import Judge  # noqa: E402
from latentdiff.evaluation.prompts import TASKS, EvaluationPrompt, Requirement, read_prompts  # noqa: E402
from latentdiff.evaluation.protocol import SEEDS_APART, judged  # noqa: E402
from latentdiff.evaluation.statistics import wilson_interval  # noqa: E402

ASKED = ("position", "color_attr")
# Of the first object and the second, where the second lies so to the first.
HALVES = {
    "left of": ("right", "left"), "right of": ("left", "right"), "above": ("bottom", "top"), "below": ("top", "bottom"),
}  # fmt: skip


def regions_of(prompt: EvaluationPrompt, weight: float) -> list[Region]:
    """A region for each of the two objects of a prompt."""

    def text(need: Requirement) -> str:
        return sentence(Plan("single", prompt.background or "white", (Thing(need.noun, need.colour),)))

    first, second = prompt.include
    places = HALVES[second.position[0]] if second.position else ("left", "right")
    return [Region(text(need), box=place, weight=weight) for need, place in zip((first, second), places, strict=True)]


def measured(pipe: Pipeline, judge: Judge, prompts: Sequence[EvaluationPrompt], weight: float, steps: int) -> list[bool]:
    """Whether each prompt is shown; without regions at weight 0."""
    correct = []
    for prompt in prompts:
        regions = regions_of(prompt, weight) if weight else None
        seed = SEEDS_APART * prompt.number
        images = pipe(prompt.text, regions=regions, seed=seed, steps=steps, sampler="ddim", progress=False)
        correct.append(judged(prompt, judge(images)[0]).correct)
    return correct


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=12, help="of each of the two tasks")
    parser.add_argument("--weights", type=float, nargs="+", default=[0.7], help="of the regions")
    parser.add_argument("--steps", type=int, default=20)
    asked = parser.parse_args()
    pipe, judge = Pipeline.load(), Judge.load(embedded_judge())
    print("| | " + " | ".join(TASKS[task] for task in ASKED) + " |\n|---|---|---|")
    for weight in (0.0, *asked.weights):
        cells = []
        for task in ASKED:
            prompts = [prompt for prompt in read_prompts() if prompt.task == task][: asked.prompts]
            correct = measured(pipe, judge, prompts, weight, asked.steps)
            low, high = wilson_interval(sum(correct), len(correct))
            cells.append(f"{sum(correct)} of {len(correct)} [{low:.2f}, {high:.2f}]")
        name = f"regions of weight {weight:g}" if weight else "the prompt alone"
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
