"""Whether a second pass at a larger size keeps what the prompt asks for: a table, by the embedded judge.

    python tools/score_hires.py --prompts 6 --strengths 0.3 0.5

The prompts are the first ones of each of the six tasks of `latentdiff evaluate`. "Too many" counts the images in which the
judge sees more of a thing than was asked for.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from PIL import Image  # noqa: E402

from latentdiff import Pipeline  # noqa: E402
from latentdiff.checkpoints.embedded import embedded_judge  # noqa: E402
from latentdiff.evaluation.judge import Judge  # noqa: E402
from latentdiff.evaluation.prompts import EvaluationPrompt, read_prompts  # noqa: E402
from latentdiff.evaluation.protocol import score_prompts  # noqa: E402
from latentdiff.evaluation.rules import objects_of  # noqa: E402


def row(pipe: Pipeline, judge: Judge, prompts: Sequence[EvaluationPrompt], steps: int, **hires: Any) -> str:
    """Share of right images with its interval, and the images with too many of a thing."""
    too_many = 0

    def count(prompt: EvaluationPrompt, images: Sequence[Image.Image]) -> None:
        nonlocal too_many
        for seen in judge(images):
            too_many += any(len(objects_of(need.noun, seen)) > need.count for need in prompt.include)

    found = score_prompts(
        partial(pipe, **hires), prompts, judge=judge, seeds_per_prompt=1, steps=steps, progress=False, on_images=count
    )
    right = sum(one.correct for one in found.outcomes)
    return f"{right} of {len(prompts)} | {too_many}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=6, help="of each of the six tasks")
    parser.add_argument("--scale", type=float, default=2.0)
    parser.add_argument("--strengths", type=float, nargs="+", default=[0.3, 0.5], help="of the second pass")
    parser.add_argument("--upscalers", nargs="+", default=["latent", "lanczos"])
    parser.add_argument("--steps", type=int, default=20)
    asked = parser.parse_args()
    pipe, judge = Pipeline.load(), Judge.load(embedded_judge())
    prompts = read_prompts(limit=asked.prompts)
    print("| second pass | right | too many |\n|---|---|---|")
    print(f"| none | {row(pipe, judge, prompts, asked.steps)} |", flush=True)
    for upscaler in asked.upscalers:
        for strength in asked.strengths:
            options = {"hires": asked.scale, "hires_upscaler": upscaler, "hires_strength": strength}
            print(f"| {upscaler}, {strength:g} | {row(pipe, judge, prompts, asked.steps, **options)} |", flush=True)


if __name__ == "__main__":
    main()
