"""T2I-Adapter (Mou et al. 2023): a small network that sees a hint once, and is added to the U-Net on its way down.

Parameter names are those of diffusers' T2IAdapter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from latentdiff.errors import UsageError
from latentdiff.networks.config import UNetConfig
from latentdiff.networks.layers import Context
from latentdiff.networks.rows import Area, Rows, acts_at

_LUMA = (0.299, 0.587, 0.114)  # of RGB (ITU-R BT.601), for adapters that see grey


@dataclass(frozen=True, kw_only=True)
class T2IAdapterConfig:
    """What a file shows.

    light: the small kind, without a convolution before its levels.
    in_channels: of the hint, 1 or 3.
    unshuffle: pixels of the hint for one of the first map along a side; 16 for SDXL.
    channels, blocks: width of each level, and how many residual blocks it has.
    """

    light: bool
    in_channels: int
    unshuffle: int
    channels: tuple[int, ...]
    blocks: int

    @property
    def halving(self) -> tuple[bool, ...]:
        """Whether each level begins at half the size of the one before: SDXL's only the third, whose first map is small."""
        levels = range(len(self.channels))
        return tuple(level == 2 if self.is_for_xl else level > 0 for level in levels)

    @property
    def is_for_xl(self) -> bool:
        """Whether its maps are those that SDXL has."""
        return self.unshuffle == 16


class T2IAdapterNetwork(nn.Module):
    """A hint -> maps that are added to a U-Net, one for each level."""

    def __init__(self, config: T2IAdapterConfig) -> None:
        super().__init__()
        self.config = config
        self.adapter = _Body(config)

    def forward(self, hint: Tensor) -> list[Tensor]:
        """A hint (N, 3, H, W), RGB from 0 to 1 -> maps (N, C, h, w), of which the first has sides H / unshuffle, rounded
        up."""
        config = self.config
        if config.in_channels == 1:
            hint = (hint * hint.new_tensor(_LUMA)[:, None, None]).sum(1, keepdim=True)
        down, right = (-side % config.unshuffle for side in hint.shape[-2:])
        hint = F.pad(hint, (0, right, 0, down), mode="replicate") if down or right else hint
        return self.adapter(F.pixel_unshuffle(hint, config.unshuffle))


class _Body(nn.Module):
    def __init__(self, config: T2IAdapterConfig) -> None:
        super().__init__()
        seen = config.in_channels * config.unshuffle**2
        if not config.light:
            self.conv_in = nn.Conv2d(seen, config.channels[0], 3, padding=1)
            seen = config.channels[0]
        inputs = (seen, *config.channels)
        self.body = nn.ModuleList(
            _Level(config, before, width, halves)
            for before, width, halves in zip(inputs, config.channels, config.halving, strict=False)
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.conv_in(x) if hasattr(self, "conv_in") else x
        maps: list[Tensor] = []
        for level in self.body:
            x = level(x)
            maps.append(x)
        return maps


class _Level(nn.Module):
    """Residual blocks at one size; of the light kind at a quarter of the width."""

    def __init__(self, config: T2IAdapterConfig, before: int, width: int, halves: bool) -> None:
        super().__init__()
        inner = width // 4 if config.light else width
        self.halves = halves
        if config.light or before != width:
            self.in_conv = nn.Conv2d(before, inner, 1)
        self.resnets = nn.ModuleList(_Block(inner, 3 if config.light else 1) for _ in range(config.blocks))
        if config.light:
            self.out_conv = nn.Conv2d(inner, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, h, w) -> (N, C', h', w')."""
        x = F.avg_pool2d(x, 2, ceil_mode=True) if self.halves else x
        x = self.in_conv(x) if hasattr(self, "in_conv") else x
        for block in self.resnets:
            x = block(x)
        return self.out_conv(x) if hasattr(self, "out_conv") else x


class _Block(nn.Module):
    def __init__(self, width: int, last: int) -> None:
        super().__init__()
        self.block1 = nn.Conv2d(width, width, 3, padding=1)
        self.block2 = nn.Conv2d(width, width, last, padding=last // 2)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, h, w) -> the same shape."""
        return x + self.block2(F.relu(self.block1(x)))


def places_of_maps(unet: UNetConfig, count: int) -> list[str]:
    """The modules to whose outputs `count` maps are added, as diffusers does: the last transformer of a level; where a level
    has none, its end; and with one map more than levels, the middle."""
    last, levels = unet.layers_per_block - 1, len(unet.block_out_channels)
    places = []
    for level, attends in enumerate(unet.attention_levels):
        end = f"resnets.{last}" if level == levels - 1 else "downsamplers.0"
        places.append(f"down_blocks.{level}.{f'attentions.{last}' if attends else end}")
    return [*places, "mid_block"][:count]


@dataclass(frozen=True)
class AppliedAdapter(Rows):
    """A T2I-Adapter on one walk; it acts on all rows alike.

    maps: by the modules to whose outputs they are added, (1, C, h, w), times its scale.
    window: the timesteps low < t <= high at which it acts.
    """

    maps: Mapping[str, Tensor]
    window: tuple[float, float]

    def on(self, text: Context, count: int, *, avoided: bool) -> AppliedAdapter:
        """On rows of a batch."""
        return self

    def within(self, rows: slice, columns: slice) -> AppliedAdapter:
        """Its maps are of the whole image.

        Raises:
            UsageError: always.
        """
        raise UsageError("regions do not go with T2I-Adapters, which see the whole image; leave one of them out")

    @classmethod
    def cat(cls, parts: Sequence[AppliedAdapter]) -> AppliedAdapter:
        """Join along the batch."""
        return parts[0]

    def cut(self, area: Area) -> AppliedAdapter:
        """Refuse it: the maps of the lower levels have no place for windows that begin at any latent."""
        raise UsageError("T2I-Adapters do not go with windows; leave window out, or take a ControlNet")

    def features(self, t: float, dtype: torch.dtype) -> Mapping[str, Tensor]:
        """See `Rows`."""
        return {name: one.to(dtype) for name, one in self.maps.items()} if acts_at(self.window, t) else {}
