"""DeepCache (Ma et al. 2024): the deep layers of the U-Net change slowly from step to step, so most steps reuse them.

A full step keeps what enters one decoder block from below. The steps after it compute only what lies around that: the
encoder blocks whose skips are needed and the decoder blocks from there on, with their own latents and timestep.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from latentdiff.errors import UsageError
from latentdiff.networks.layers import Context
from latentdiff.networks.steering import Network
from latentdiff.networks.taps import Tap
from latentdiff.networks.unet import UNet

# How quickly full steps thin out away from the centre of an uneven schedule; the authors' choice for 50 steps.
POWER = 1.4


@dataclass(frozen=True)
class CacheSettings:
    """When the deep layers are computed, and how deep they begin.

    interval: a full step every so many; 1 is no caching.
    branch: skip connections that the steps between recompute besides the outermost one; 0 is the fastest.
    centre: the step, from 0, around which full steps lie densest; None spreads them evenly.

    Raises:
        UsageError: a value outside its domain.
    """

    interval: int = 1
    branch: int = 0
    centre: int | None = None

    def __post_init__(self) -> None:
        if self.interval < 1:
            raise UsageError(f"expected a cache interval of 1 (no caching) or more, found {self.interval}")
        if self.branch < 0:
            raise UsageError(f"expected a cache branch of 0 or more, found {self.branch}")
        if self.centre is not None and self.centre < 0:
            raise UsageError(f"expected a cache centre of step 0 or later, found {self.centre}")

    def full_steps(self, steps: int) -> set[int]:
        """The indices of the full steps among `steps`; the first always is one."""
        count = -(-steps // self.interval)
        if self.centre is None or self.interval == 1:
            return set(range(0, steps, self.interval))
        if self.centre >= steps:
            raise UsageError(f"expected a cache centre below the {steps} steps, found {self.centre}")
        first, last = -(self.centre ** (1 / POWER)), (steps - self.centre) ** (1 / POWER)
        roots = [first + (last - first) * i / count for i in range(count)]
        return {0} | {round(self.centre + (abs(root) ** POWER) * (1 if root > 0 else -1)) for root in roots}


UNCACHED = CacheSettings()


@dataclass(frozen=True)
class _Kept:
    """Deep features, and when they were last used."""

    text: Context
    deep: Tensor  # (N, C, h, w)
    step: int


class DeepCache:
    """A network for one walk of a batch of images, called once a step, or at each step once for each length of text,
    that computes less than the one it wraps.

    Features are kept with the text that they were computed for. Where guidance switches on or off, or the prompt
    changes, another text comes, and the step is a full one. Nothing is kept beyond this object.

    Args:
        network: computes full steps; it has to call the modules of `unet`, where the features are read.
        steps: how many there will be.

    Raises:
        UsageError: the U-Net has no such branch, or the schedule's centre lies beyond the last step.
    """

    def __init__(self, network: Network, unet: UNet, settings: CacheSettings, steps: int) -> None:
        self._network, self._unet = network, unet
        self._branch = _Branch(unet, settings.branch)
        self._full_steps = settings.full_steps(steps)
        self._step = -1
        self._t: float | None = None
        self._kept: dict[int, _Kept] = {}  # by the text's identity
        self._deep: Tensor | None = None

    def __call__(self, x: Tensor, t: Tensor | float, context: Context) -> Tensor:
        """As `UNet.__call__`."""
        kept = self._kept.get(id(context))
        if float(t) != self._t or (kept is not None and kept.step == self._step):
            self._step, self._t = self._step + 1, float(t)
            self._kept = {key: last for key, last in self._kept.items() if last.step == self._step - 1}
            kept = self._kept.get(id(context))
        if kept is not None and self._step not in self._full_steps:
            self._kept[id(context)] = replace(kept, step=self._step)
            return self._branch(x, t, context, kept.deep)
        self._deep = None
        with Tap(self._unet, [self._branch.entrance], arguments=self._keep):
            raw = self._network(x, t, context)
        if self._deep is None:
            raise UsageError(
                "the cache needs a back end that runs the U-Net's own modules; leave the cache interval at 1"
            )
        self._kept[id(context)] = _Kept(context, self._deep, self._step)
        return raw

    def _keep(self, name: str, arguments: tuple[Tensor, ...]) -> None:
        self._deep = arguments[0][:, : self._branch.channels].clone()  # what follows in the channels is the skip


class _Branch:
    """The part of a U-Net outside of what is cached."""

    def __init__(self, unet: UNet, branch: int) -> None:
        blocks = [(up, index) for up, level in enumerate(unet.up_blocks) for index in range(len(level.resnets))]
        if branch >= len(blocks):
            raise UsageError(f"expected a cache branch of 0 to {len(blocks) - 1} for this U-Net, found {branch}")
        self._unet, self._branch = unet, branch
        self._decoder = blocks[len(blocks) - 1 - branch :]
        up, index = self._decoder[0]
        self.entrance = f"up_blocks.{up}.resnets.{index}"
        widths = unet.config.block_out_channels[::-1]
        self.channels = widths[up] if index else widths[max(up - 1, 0)]  # from below, without the skip

    def __call__(self, x: Tensor, t: Tensor | float, context: Context, deep: Tensor) -> Tensor:
        """The prediction from what enters the first of the decoder blocks (N, C, h', w')."""
        unet = self._unet
        time, context = unet.embedded(x, t, context)
        skips = self._encode(unet.conv_in(x), time, context)
        x = deep
        for up, index in self._decoder:
            level = unet.up_blocks[up]
            x = level.block(index, torch.cat([x, skips.pop()], dim=1), time, context)
            if index == len(level.resnets) - 1:
                for upsample in level.upsamplers:
                    x = upsample(x, size=skips[-1].shape[-2:])
        return unet.conv_out(F.silu(unet.conv_norm_out(x)))

    def _encode(self, x: Tensor, time: Tensor, context: Context) -> list[Tensor]:
        """The outermost skips: that of the first convolution and as many more as the branch is deep."""
        skips = [x]
        for level, place in list(self._encoder())[: self._branch]:
            x = level.downsamplers[0](x) if place is None else level.block(place, x, time, context)
            skips.append(x)
        return skips

    def _encoder(self) -> Iterator[tuple[torch.nn.Module, int | None]]:
        """Levels and places of the encoder blocks in order; None is the downsampling of a level."""
        for level in self._unet.down_blocks:
            yield from ((level, index) for index in range(len(level.resnets)))
            yield from ((level, None) for _ in level.downsamplers)
