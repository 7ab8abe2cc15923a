"""Editing and restoring images without training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from latentdiff.recipe import Recipe
from latentdiff.tasks import (
    editing,
    enlarging,
    inpainting,
    interpolation,
    refining,
    translation,
    upscaling,
    variations,
)
from latentdiff.tasks.editing import image_to_image as image_to_image
from latentdiff.tasks.enlarging import enlarge as enlarge
from latentdiff.tasks.inpainting import inpaint as inpaint
from latentdiff.tasks.interpolation import interpolate as interpolate
from latentdiff.tasks.inversion import Inversion as Inversion
from latentdiff.tasks.inversion import invert as invert
from latentdiff.tasks.refining import refine as refine
from latentdiff.tasks.restoration import operators as operators
from latentdiff.tasks.restoration import task as restoring
from latentdiff.tasks.restoration.task import restore as restore
from latentdiff.tasks.translation import translate as translate
from latentdiff.tasks.upscaling import upscale as upscale
from latentdiff.tasks.variations import vary as vary

# (model, recipe, files of its sources by role) -> the image once more, or the bytes of an animation; by the `task`
# that recipes name. A recipe without a model is made again without one.
TASKS: dict[str, Callable[[Any, Recipe, Mapping[str, Path]], Image.Image | bytes]] = {
    editing.TASK: editing.again,
    enlarging.TASK: enlarging.again,
    inpainting.TASK: inpainting.again,
    interpolation.TASK: interpolation.again,
    refining.TASK: refining.again,
    restoring.TASK: restoring.again,
    translation.TASK: translation.again,
    upscaling.TASK: upscaling.again,
    variations.TASK: variations.again,
}
