"""The tools that compose scenes, imported by path, and a few scenes made with them."""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path
from random import Random

import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))  # where the tools find one another

import make_scenes  # noqa: E402
import scene_language  # noqa: E402

from latentdiff.errors import MissingDependencyError  # noqa: E402
from latentdiff.evaluation.prompts import EvaluationPrompt, prompt_of_scene  # noqa: E402

JUDGE = ROOT / "weights" / "judge"


@cache
def find_font() -> Path | None:
    try:
        return make_scenes.find_font()
    except MissingDependencyError:
        return None


def font() -> Path:
    """The emoji font; without it, the test that asks is skipped."""
    if (path := find_font()) is None:
        pytest.skip("the colour emoji font is not installed")
    return path


def drawn(split: str, kind: str, rng: Random, size: int = 96):
    """A plan of the split and the kind, its image and its boxes."""
    while True:
        plan = scene_language.draw_plan(rng, split, kind)
        if (found := make_scenes.compose(plan, rng, size, font())) is not None:
            return plan, *found


def asked_and_shown(kind: str, rng: Random, split: str = "test") -> tuple[EvaluationPrompt, Image.Image]:
    """A prompt and an image that shows what it asks for."""
    plan, image, _ = drawn(split, kind, rng)
    return prompt_of_scene(plan.as_json(), scene_language.prompt(plan)), image
