"""The model as a prior: ways to restore what a known operator took away, each over the one denoise loop.

All are pure functions of a denoiser and a `InverseProblem`; none keeps a graph from one step to the next. To add one, write it
in a file of this folder and name it in `METHODS`.
"""

from __future__ import annotations

from latentdiff.errors import UsageError
from latentdiff.tasks.restoration.methods.diffpir import DiffPIR
from latentdiff.tasks.restoration.methods.gradient import DPS, PSLD
from latentdiff.tasks.restoration.methods.graikos import Graikos
from latentdiff.tasks.restoration.methods.resample import ReSample
from latentdiff.tasks.restoration.problem import PIXELS, Autoencoder, InverseProblem, RestorationMethod, within_noise

__all__ = [
    "DPS",
    "METHODS",
    "PIXELS",
    "PSLD",
    "Autoencoder",
    "DiffPIR",
    "Graikos",
    "RestorationMethod",
    "InverseProblem",
    "ReSample",
    "get_method",
    "within_noise",
]

METHODS: dict[str, type] = {"diffpir": DiffPIR, "dps": DPS, "psld": PSLD, "resample": ReSample, "graikos": Graikos}


def get_method(name: str, **settings: float | bool) -> RestorationMethod:
    """The method of that name with some settings other than its defaults.

    Raises:
        UsageError: an unknown name, or a setting that is not the method's or outside its domain.
    """
    if name not in METHODS:
        raise UsageError(f"method must be one of {', '.join(METHODS)}, found {name!r}")
    known = METHODS[name].__dataclass_fields__
    if unknown := set(settings) - set(known):
        raise UsageError(f"the method {name} has the settings {', '.join(known)}; found {', '.join(sorted(unknown))}")
    return METHODS[name](**settings)
