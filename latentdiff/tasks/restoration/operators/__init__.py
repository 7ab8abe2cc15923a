"""Known degradations y = A x + n, with what restoration needs of them: adjoint, pseudo-inverse and proximal map.

To add one, derive it from `Operator`; `apply` and the two shapes are enough.
"""

from __future__ import annotations

from latentdiff.tasks.restoration.operators.composition import Composition, Function, Inside, Nonlinear
from latentdiff.tasks.restoration.operators.convolution import (
    BORDERS,
    RESAMPLING_KERNELS,
    Convolution,
    Deblur,
    SuperResolution,
)
from latentdiff.tasks.restoration.operators.description import describe, from_description
from latentdiff.tasks.restoration.operators.kernels import gaussian_blur, motion_blur
from latentdiff.tasks.restoration.operators.operator import Operator, residual
from latentdiff.tasks.restoration.operators.pointwise import Colourise, Denoise, Inpaint

__all__ = [
    "BORDERS",
    "RESAMPLING_KERNELS",
    "Colourise",
    "Composition",
    "Convolution",
    "Deblur",
    "Denoise",
    "Function",
    "Inpaint",
    "Inside",
    "Nonlinear",
    "Operator",
    "SuperResolution",
    "describe",
    "from_description",
    "gaussian_blur",
    "motion_blur",
    "residual",
]
