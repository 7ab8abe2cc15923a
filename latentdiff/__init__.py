"""Latent text-to-image diffusion.

    from latentdiff import Pipeline
    images = Pipeline.load()("two cats on a blue background", seed=0)

Importing this package is instant; torch is loaded when a name is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from latentdiff.adapters.control.image_prompts import ImagePrompt as ImagePrompt
    from latentdiff.adapters.control.image_prompts import IPAdapter as IPAdapter
    from latentdiff.adapters.control.model import ControlNet as ControlNet
    from latentdiff.adapters.control.regions import Region as Region
    from latentdiff.errors import LatentDiffError as LatentDiffError
    from latentdiff.evaluation.run import evaluate as evaluate
    from latentdiff.image import save_image as save_image
    from latentdiff.image import save_png as save_png
    from latentdiff.networks.upscaling.model import Upscaler as Upscaler
    from latentdiff.pipeline import Pipeline as Pipeline
    from latentdiff.tasks.editing import image_to_image as image_to_image
    from latentdiff.tasks.enlarging import enlarge as enlarge
    from latentdiff.tasks.inpainting import inpaint as inpaint
    from latentdiff.tasks.interpolation import interpolate as interpolate
    from latentdiff.tasks.inversion.run import invert as invert
    from latentdiff.tasks.restoration.task import restore as restore
    from latentdiff.tasks.translation import translate as translate
    from latentdiff.tasks.upscaling import upscale as upscale
    from latentdiff.tasks.variations import vary as vary
    from latentdiff.training.finetuning.finetune import finetune as finetune
    from latentdiff.training.stages.train import train as train

__version__ = "0.1.0"

_HOMES = {
    "ControlNet": "latentdiff.adapters.control.model",
    "IPAdapter": "latentdiff.adapters.control.image_prompts",
    "ImagePrompt": "latentdiff.adapters.control.image_prompts",
    "LatentDiffError": "latentdiff.errors",
    "Pipeline": "latentdiff.pipeline",
    "Region": "latentdiff.adapters.control.regions",
    "Upscaler": "latentdiff.networks.upscaling.model",
    "enlarge": "latentdiff.tasks.enlarging",
    "evaluate": "latentdiff.evaluation.run",
    "finetune": "latentdiff.training.finetuning.finetune",
    "image_to_image": "latentdiff.tasks.editing",
    "inpaint": "latentdiff.tasks.inpainting",
    "interpolate": "latentdiff.tasks.interpolation",
    "invert": "latentdiff.tasks.inversion.run",
    "restore": "latentdiff.tasks.restoration.task",
    "save_image": "latentdiff.image",
    "save_png": "latentdiff.image",
    "train": "latentdiff.training.stages.train",
    "translate": "latentdiff.tasks.translation",
    "upscale": "latentdiff.tasks.upscaling",
    "vary": "latentdiff.tasks.variations",
}
__all__ = [
    "ControlNet",
    "IPAdapter",
    "ImagePrompt",
    "LatentDiffError",
    "Pipeline",
    "Region",
    "Upscaler",
    "__version__",
    "enlarge",
    "evaluate",
    "finetune",
    "image_to_image",
    "inpaint",
    "interpolate",
    "invert",
    "restore",
    "save_image",
    "save_png",
    "train",
    "translate",
    "upscale",
    "vary",
]


def __getattr__(name: str) -> object:
    from importlib import import_module

    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
