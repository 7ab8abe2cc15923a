"""Soft painting: a grey mask says how far each place may go from the image (Levin & Fried 2023, "Differential
Diffusion").

A place with the value v is held at the image, noised, until only the share v of the steps is left, and is free from
then on. So a mask that has one value v all over is image to image with the strength v.
"""

from __future__ import annotations

from collections.abc import Callable

from PIL import Image
from torch import Tensor

from latentdiff.diffusion.latents import NoiseStream
from latentdiff.diffusion.schedule import Level
from latentdiff.networks.vae import LatentDistribution
from latentdiff.request.plan import Plan, Start
from latentdiff.request.second_pass import noised

RAMP = 4  # of the result's edge in pixels: from this share of white on, nothing of the image is mixed in


def starts_softly(
    cells: Tensor, encoded: LatentDistribution, plan: Plan, *, from_noise: bool
) -> Callable[[slice, NoiseStream], Start]:
    """From the image noised, and held there where and as long as the mask says.

    Args:
        cells: (1, 1, h, w), 0 to 1, the mask for latents.
        from_noise: what is free at once begins in pure noise, else in the image noised.
    """
    signals = sorted({level.alpha_cumprod for level in plan.levels[:-1]})  # from which steps begin
    steps = len(signals)

    def start(part: slice, noise: NoiseStream) -> Start:
        latents = encoded.sample(noise())  # (N, C, h, w); the order of draws is that of image to image
        eps = noise()

        def hold(x: Tensor, level: Level, *, taken: int = 1) -> Tensor:
            place = steps if level.is_clean else signals.index(level.alpha_cumprod)
            is_free = (cells * steps >= steps - place + taken - 1e-4).to(x.dtype)  # in the step that leads to here
            known = latents if level.is_clean else noised(latents, eps, level)
            return is_free * x + (1.0 - is_free) * known

        first = plan.levels[0]
        x = plan.start_scale * eps if from_noise else noised(latents, eps, first)
        return Start(hold(x, first, taken=0), after_step=hold)

    return start


def ramped(mask: Image.Image) -> Image.Image:
    """The mask by which the result is put over the image: white but for the darkest places."""
    return mask.point([min(255, RAMP * value) for value in range(256)])
