"""Known degradations y = A x + n, with what restoration needs of them: adjoint, pseudo-inverse and proximal map.

To add one, derive it from `Operator`; `apply` and the two shapes are enough.
"""

from __future__ import annotations

from latentdiff.tasks.operators.composition import Composition, Function, Inside, Nonlinear
from latentdiff.tasks.operators.convolution import BORDERS, RESAMPLING_KERNELS, Convolution, Deblur, SuperResolution
from latentdiff.tasks.operators.description import describe, from_description
from latentdiff.tasks.operators.kernels import gaussian_blur, motion_blur
from latentdiff.tasks.operators.operator import Operator, residual
from latentdiff.tasks.operators.pointwise import Colourise, Denoise, Inpaint

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
