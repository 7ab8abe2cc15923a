"""Direct inversion (Ju et al. 2024): while editing, hold the source on the trajectory that its inversion stored.

Their three lines add to the source, after each step, what the step lacks to the stored latents. That is the same as
putting the stored latents there, whatever the guidance and the number of steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from latentdiff.diffusion.schedule import Level


def on_pivots(levels: Sequence[Level], latents: Sequence[Tensor]) -> Callable[[Tensor, Level], Tensor]:
    """An `after_step` for `denoise` that puts the first rows of x onto `latents` (S, C, h, w) of the level reached.

    Rows after the first S, those of the edit, go their own way.
    """
    pivots = dict(zip(levels, latents, strict=True))

    def after_step(x: Tensor, level: Level) -> Tensor:
        pivot = pivots[level]
        x = x.clone()
        x[: len(pivot)] = pivot
        return x

    return after_step
