"""A U-Net whose self-attention is weakened in its middle: what guidance leads away from.

PAG (Ahn et al. 2024): each place sees itself alone, as if the attention map were the identity. SEG (Hong 2024): the
queries are blurred over the feature map.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from latentdiff.diffusion.guidance import Model
from latentdiff.diffusion.guidance_kinds import Weakening
from latentdiff.networks.taps import Tap

PLACE = "mid_block."  # where the authors, and diffusers, weaken it if nothing else is said


def weakened_model(model: Model, unet: nn.Module, weakening: Weakening) -> Model:
    """The model while the self-attentions in the middle of `unet`, which it has to call, are weakened."""

    def weakened(x: Tensor, t: float, context: Any) -> Tensor:
        with _weakened(unet, weakening.blur):
            return model(x, t, context)

    return weakened


@contextmanager
def _weakened(unet: nn.Module, blur: float | None) -> Iterator[None]:
    attentions = [name for name, _ in unet.named_modules() if name.startswith(PLACE) and name.endswith(".attn1")]
    if blur is None:
        values: dict[str, Tensor] = {}

        def remember(name: str, arguments: tuple[Any, ...], output: Tensor) -> None:
            values[name.removesuffix(".to_v")] = output

        def replace(name: str, arguments: tuple[Any, ...]) -> tuple[Tensor]:
            return (values.pop(name.removesuffix(".to_out")),)

        into = [f"{name}.to_v" for name in attentions], [f"{name}.to_out" for name in attentions]
        with Tap(unet, into[0], output=remember), Tap(unet, into[1], arguments=replace):
            yield
        return
    sizes: list[tuple[int, int]] = []

    def measure(name: str, arguments: tuple[Any, ...]) -> None:
        sizes[:] = [arguments[0].shape[-2:]]

    def blurred(name: str, arguments: tuple[Any, ...], output: Tensor) -> Tensor:
        queries = output.transpose(1, 2).unflatten(2, sizes[0])  # (N, C, h, w)
        return blurred_map(queries, blur).flatten(2).transpose(1, 2)

    maps = {name.partition(".transformer_blocks")[0] for name in attentions}
    with Tap(unet, maps, arguments=measure), Tap(unet, [f"{name}.to_q" for name in attentions], output=blurred):
        yield


def blurred_map(x: Tensor, blur: float) -> Tensor:
    """A feature map (N, C, h, w) blurred by a Gaussian of the standard deviation `blur`, mirrored at its border.

    The kernel reaches three standard deviations far, as far as the map is large; infinity gives the mean.
    """
    if math.isinf(blur):
        return x.mean((2, 3), keepdim=True).expand_as(x)
    for axis in (2, 3):
        reach = min(math.ceil(6.0 * blur) // 2, x.shape[axis] // 2, x.shape[axis] - 1)
        places = torch.arange(-reach, reach + 1, dtype=torch.float32)
        kernel = torch.exp(-0.5 * (places / max(blur, 1e-6)).square())
        kernel = (kernel / kernel.sum()).to(x)
        padding, shape = ((0, 0, reach, reach), (1, 1, -1, 1)) if axis == 2 else ((reach, reach, 0, 0), (1, 1, 1, -1))
        kernel = kernel.view(shape).expand(x.shape[1], -1, -1, -1)
        x = F.conv2d(F.pad(x, padding, mode="reflect"), kernel, groups=x.shape[1])
    return x
