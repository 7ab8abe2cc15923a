"""The tools that compose scenes, imported by path, and scenes made with them of the few glyphs that lie here."""

from __future__ import annotations

import sys
from pathlib import Path
from random import Random

from PIL import Image

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))  # where the tools find one another

import glyphs  # noqa: E402
import make_scenes  # noqa: E402
import scene_language  # noqa: E402

from latentdiff.evaluation.prompts import EvaluationPrompt, prompt_of_scene  # noqa: E402

JUDGE = ROOT / "weights" / "judge"
GLYPHS = ROOT / "tests" / "glyphs"
FEW = glyphs.Glyphs(GLYPHS)  # a tenth of the nouns, the new one and two strange ones
SIZE = make_scenes.SIZE


def drawn(split: str, kind: str, rng: Random, size: int = SIZE):
    """A plan of the split and the kind, its image and its boxes."""
    while True:
        plan = scene_language.draw_plan(rng, split, kind, FEW.nouns)
        if (found := make_scenes.compose(plan, rng, size, FEW)) is not None:
            return plan, Image.fromarray(found[0]), found[1]


def asked_and_shown(kind: str, rng: Random, split: str = "test") -> tuple[EvaluationPrompt, Image.Image]:
    """A prompt and an image that shows what it asks for."""
    plan, image, _ = drawn(split, kind, rng)
    return prompt_of_scene(plan.as_json(), scene_language.prompt(plan)), image


def scene_folder(folder: Path, count: int, *options: str) -> Path:
    """A folder of scenes as the tool writes it; returns it."""
    arguments = [str(folder), "--count", str(count), "--workers", "1", "--glyphs", str(GLYPHS), *options]
    make_scenes.main(arguments, standalone_mode=False)
    return folder
