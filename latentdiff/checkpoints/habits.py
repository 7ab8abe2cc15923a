"""How distilled models are drawn, told by what they are called: no tensor shows it, and single files do not say it.

Sources: the cards of stabilityai/sdxl-turbo and sd-turbo (Sauer et al. 2023), ByteDance/SDXL-Lightning (Lin et al. 2024) and
ByteDance/Hyper-SD (Ren et al. 2024). Fine-tunes and merges of them are published with about the settings of `_MERGED`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from latentdiff.checkpoints.raw import RawModel
from latentdiff.diffusion.config import ScheduleConfig

_TITLE = "modelspec.title"
_EULER = {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "trailing"}
_EULER_ANCESTRAL = {"_class_name": "EulerAncestralDiscreteScheduler", "timestep_spacing": "trailing"}
_DDIM = {"_class_name": "DDIMScheduler", "timestep_spacing": "trailing", "clip_sample": False}
_SDE = {"_class_name": "DPMSolverSDEScheduler", "timestep_spacing": "leading", "use_karras_sigmas": True}

_TURBO = re.compile(r"sd[_-]?(xl)?[_-]?turbo")
_STEPS = re.compile(r"(\d+)[ _-]?steps?(?![a-z])")
_KINDS = {
    "Lightning": re.compile(r"lightning"),
    "Hyper": re.compile(r"hyper(?=[ _-]?(sd|xl|\d|[ _-]|$))"),
    "Turbo": re.compile(r"turbo"),
}


@dataclass(frozen=True)
class Habit:
    """What a kind of distilled models is drawn with.

    steps, guidance_scale: where nothing else is asked for.
    scheduler: entries of a `scheduler_config.json`, for files that have none.
    side: of the latents of the training, where it is not that of the family.
    """

    kind: str
    steps: int
    guidance_scale: float
    scheduler: Mapping[str, Any]
    side: int | None = None


_MERGED = {"steps": 6, "guidance_scale": 2.0, "scheduler": _SDE}


def habit_of(names: Iterable[str], *, is_xl: bool) -> Habit | None:
    """The habit of a model that is called so; None for one that is called like any other."""
    name = " ".join(names).lower()
    if _TURBO.search(name):
        return Habit("Turbo", 1, 1.0, _EULER_ANCESTRAL if is_xl else _EULER, side=64)
    kind = next((kind for kind, pattern in _KINDS.items() if pattern.search(name)), None)
    if kind is None or not is_xl:
        return None
    steps = int(match[1]) if (match := _STEPS.search(name)) else 0
    if kind == "Lightning" and 1 <= steps <= 8:
        predicts = {"prediction_type": "sample"} if "x0" in name else {}
        return Habit(kind, steps, 1.0, {**_EULER, **predicts})
    if kind == "Hyper" and 2 <= steps <= 8:
        return Habit(kind, steps, 1.0, _DDIM)
    return Habit(kind, **_MERGED)


def take_habit(raw: RawModel, name: str, *, prediction_type: str | None = None) -> Habit | None:
    """The habit of a model, whose configurations say of the schedule and the size what a single file left unsaid.

    Args:
        prediction_type: what the caller said, which counts.
    """
    names = (name, raw.source.stem, raw.metadata.get(_TITLE, ""))
    habit = habit_of(names, is_xl=raw.configs["unet"].get("addition_embed_type") is not None)
    if habit is not None and not raw.source.is_dir():
        raw.configs["scheduler"] |= habit.scheduler
        raw.configs["scheduler"] |= {"prediction_type": prediction_type} if prediction_type else {}
        raw.configs["unet"] |= {"sample_size": habit.side} if habit.side else {}
    return habit


def with_habit(config: ScheduleConfig, habit: Habit, name: str) -> ScheduleConfig:
    """A schedule whose model is drawn so where nothing else is asked for, and that says so."""
    drawing = config.drawing
    how = ", ".join(filter(None, (drawing.sampler, drawing.spacing or config.timestep_spacing)))
    said = f"{habit.steps} step{'s' * (habit.steps > 1)} and guidance {habit.guidance_scale:g}"
    habit_text = f"{name} is called as {habit.kind} models are: {said}, {how}, where nothing else is asked for"
    return config.with_drawing(
        replace(drawing, steps=habit.steps, guidance_scale=habit.guidance_scale, habit=habit_text)
    )
