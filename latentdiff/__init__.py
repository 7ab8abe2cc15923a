"""Latent text-to-image diffusion.

    from latentdiff import Pipeline
    images = Pipeline.load()("two cats on a blue background", seed=0)

Importing this package is instant; torch and transformers are loaded when a name is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from latentdiff.errors import LatentDiffError as LatentDiffError
    from latentdiff.pipeline import Pipeline as Pipeline
    from latentdiff.training.finetuning.run import finetune as finetune

__version__ = "0.1.0"

_HOMES = {
    "Pipeline": "latentdiff.pipeline",
    "LatentDiffError": "latentdiff.errors",
    "finetune": "latentdiff.training.finetuning.run",
}
__all__ = ["LatentDiffError", "Pipeline", "__version__", "finetune"]  # noqa: F822 (three of them by __getattr__)


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
