"""Edits of rendered scenes whose outcome is known, and what can be measured of them without any network but the
judge."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from PIL import Image
from scene_language import BACKGROUNDS, OBJECT_COLOURS, Plan, Thing, prompt
from torch import Tensor

from latentdiff.diffusion.schedule import Level
from latentdiff.errors import DataError
from latentdiff.evaluation.judge import Judge
from latentdiff.evaluation.prompts import EvaluationPrompt, Requirement
from latentdiff.evaluation.rules import background_fits, failures
from latentdiff.image import open_image

PATCH, STRIDE, BINS = 8, 4, 8  # pixels, pixels, orientations in half a turn
FLAT = 0.5  # summed gradient of a patch, of luminance in 0 to 1, from which on it counts as textured
LEVELS = 4  # of each colour channel in the histogram


@dataclass(frozen=True)
class EditCase:
    """A scene, what it shows, and what it shall show in the same layout."""

    source: Image.Image
    shown: EvaluationPrompt
    target: EvaluationPrompt

    @property
    def source_prompt(self) -> str:
        return self.shown.text


def read_lines(folder: Path) -> list[dict[str, Any]]:
    """What `metadata.jsonl` says of each scene.

    Raises:
        DataError: there is none in `folder`.
    """
    metadata = folder / "metadata.jsonl"
    if not metadata.is_file():
        raise DataError(f"expected scenes in {folder}, found no metadata.jsonl; make them with tools/make_scenes.py")
    return [json.loads(text) for text in metadata.read_text(encoding="utf-8").splitlines()]


def read_cases(folder: Path, count: int, seed: int = 0) -> list[EditCase]:
    """Scenes with one object, each to get another colour of the object or of the background, in turn.

    Raises:
        DataError: there are no or too few such scenes in `folder`, which tools/make_scenes.py makes.
    """
    rng = Random(seed)
    cases: list[EditCase] = []
    for line in read_lines(folder):
        scene = line["scene"]
        if scene["kind"] not in ("single", "colour") or len(scene["objects"]) != 1:
            continue
        thing = Thing(*(scene["objects"][0][name] for name in ("noun", "colour", "size")))
        before = Plan(scene["kind"], scene["background"], (thing,))
        after = _recoloured(before, rng) if len(cases) % 2 else _on_another_background(before, rng)
        cases.append(EditCase(open_image(folder / line["file_name"]), _asked(before), _asked(after)))
        if len(cases) == count:
            return cases
    raise DataError(f"expected {count} scenes with one object in {folder}, found {len(cases)}")


def _recoloured(plan: Plan, rng: Random) -> Plan:
    (thing,) = plan.things
    colours = [colour for colour in OBJECT_COLOURS if colour not in (thing.colour, plan.background)]
    return Plan("colour", plan.background, (replace(thing, colour=rng.choice(colours)),))


def _on_another_background(plan: Plan, rng: Random) -> Plan:
    (thing,) = plan.things
    return Plan(
        plan.kind,
        rng.choice([name for name in BACKGROUNDS if name not in (thing.colour, plan.background)]),
        plan.things,
    )


def _asked(plan: Plan) -> EvaluationPrompt:
    (thing,) = plan.things
    need = Requirement(thing.noun, colour=thing.colour)
    return EvaluationPrompt(
        "colors" if thing.colour else "single_object", prompt(plan), (need,), background=plan.background
    )


def text_score(judge: Judge, images: Sequence[Image.Image], cases: Sequence[EditCase]) -> list[bool]:
    """Whether each image shows what its case asks for: the thing, its colour if one is asked for, and the
    background."""
    verdicts = judge(list(images))
    return [
        not failures(case.target, seen) and background_fits(case.target, seen)
        for case, seen in zip(cases, verdicts, strict=True)
    ]


def structure_distance(a: Image.Image, b: Image.Image) -> float:
    """How differently two images of one size are laid out, 0 for the same; colours do not count.

    Each image is described by how alike its own patches are to one another, in the orientations of their edges; the
    distance is the mean squared difference of these likenesses, in the form of the DINO self-similarity metric of
    Tumanyan et al. 2022.
    """
    return float(np.square(_self_similarity(a) - _self_similarity(b)).mean())


def _self_similarity(image: Image.Image) -> np.ndarray:
    luminance = np.asarray(image.convert("L"), dtype=np.float64) / 255.0  # (H, W)
    dy, dx = np.gradient(luminance)
    strength, angle = np.hypot(dx, dy), np.arctan2(dy, dx) % math.pi
    number = np.minimum((angle / math.pi * BINS).astype(int), BINS - 1)
    maps = np.stack([strength * (number == k) for k in range(BINS)])  # (bins, H, W)
    patches = np.lib.stride_tricks.sliding_window_view(maps, (PATCH, PATCH), axis=(1, 2))[:, ::STRIDE, ::STRIDE]
    described = patches.sum((3, 4)).reshape(BINS, -1).T  # (patches, bins)
    described = described / (np.linalg.norm(described, axis=1, keepdims=True) + FLAT)
    return described @ described.T


def colour_likeness(a: Image.Image, b: Image.Image) -> float:
    """The part of the colour histogram that two images share, 0 to 1: how much of the source's look leaks into an
    edit."""
    return float(np.minimum(_histogram(a), _histogram(b)).sum())


def _histogram(image: Image.Image) -> np.ndarray:
    levels = np.asarray(image.convert("RGB")).astype(int) * LEVELS // 256
    codes = (levels * np.array([LEVELS**2, LEVELS, 1])).sum(-1)
    return np.bincount(codes.ravel(), minlength=LEVELS**3) / codes.size


def calibration(images: Sequence[Image.Image]) -> dict[str, float]:
    """The structure distance of changes whose size is known, as shares of that of a random pair of scenes.

    To be trusted, it has to be 0 for the same image, below 0.2 for other colours, and above 0.7 for another place.
    """
    pairs = list(zip(images, [*images[1:], images[0]], strict=True))
    random = float(np.mean([structure_distance(a, b) for a, b in pairs]))
    changes = {
        "the same": lambda image: image,
        "hue turned by a third": _turned_hue,
        "contrast halved": lambda image: Image.blend(
            Image.new("RGB", image.size, (128,) * 3), image.convert("RGB"), 0.5
        ),
        "moved by 8 pixels": lambda image: Image.fromarray(np.roll(np.asarray(image.convert("RGB")), (8, 8), (0, 1))),
    }
    shares = {
        name: float(np.mean([structure_distance(i, change(i)) for i in images])) / random
        for name, change in changes.items()
    }
    return shares | {"a random pair": 1.0, "(of a random pair, absolute)": random}


def _turned_hue(image: Image.Image) -> Image.Image:
    hue, saturation, value = image.convert("HSV").split()
    return Image.merge("HSV", (hue.point(lambda level: (level + 85) % 256), saturation, value)).convert("RGB")


def mean_and_margin(values: Sequence[float]) -> str:
    """The mean with half of its 95 % interval, as text."""
    array = np.asarray(values, dtype=np.float64)
    return f"{array.mean():.4g} ± {1.96 * array.std(ddof=1) / math.sqrt(len(array)):.2g}"


def on_pivots(levels: Sequence[Level], latents: Sequence[Tensor]) -> Callable[[Tensor, Level], Tensor]:
    """An `after_step` for `denoise` that puts the first rows of x onto `latents` (S, C, h, w) of the level reached.

    Direct inversion (Ju et al. 2024) adds to the source, after each step, what that lacks to the stored latents, which is
    the same. Rows after the first S, those of the edit, go their own way.
    """
    pivots = dict(zip(levels, latents, strict=True))

    def after_step(x: Tensor, level: Level) -> Tensor:
        pivot = pivots[level]
        x = x.clone()
        x[: len(pivot)] = pivot
        return x

    return after_step
