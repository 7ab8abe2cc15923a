"""The judge's network: a small detector that finds objects by their centres (Zhou et al. 2019, "Objects as Points").

It shares no weights with any generative model.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from latentdiff.errors import ConfigError

STRIDE = 4  # pixels per cell of the map


@dataclass(frozen=True)
class JudgeConfig:
    """What the judge can name, in the order of its outputs, and how large it is."""

    nouns: tuple[str, ...]
    colours: tuple[str, ...]  # an object may also have its own colours, the class after these
    backgrounds: tuple[str, ...]
    size: int = 96  # pixels per side of the input
    channels: tuple[int, ...] = (64, 96, 128)  # at strides 4, 8 and 16
    blocks: tuple[int, ...] = (1, 3, 1)  # residual blocks there
    threshold: float = 0.5  # smallest score of an object that counts as seen
    unknown: bool = False  # whether the class after the nouns is "too damaged to be any of them"

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> JudgeConfig:
        """Read what `to_json` gave.

        Raises:
            ConfigError: a key is missing or unknown.
        """
        try:
            return cls(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})
        except TypeError as error:
            raise ConfigError(f"not a judge's config.json: {error}") from error

    def to_json(self) -> dict[str, Any]:
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}


@dataclass(frozen=True)
class JudgeOutput:
    """Raw outputs; h = w = size / STRIDE."""

    centre: Tensor  # (N, h, w) logit: here is the centre of an object
    noun: Tensor  # (N, nouns, h, w) logits; one more, the last, where the judge has the class "unknown"
    colour: Tensor  # (N, colours + 1, h, w) logits; the last is "its own colours"
    box: Tensor  # (N, 4, h, w) x and y of the centre from the cell's middle, width, height; in shares of the side
    background: Tensor  # (N, backgrounds) logits

    def __getitem__(self, images: slice) -> JudgeOutput:
        """The outputs of some of the images."""
        return JudgeOutput(*(getattr(self, field.name)[images] for field in fields(self)))


class JudgeNetwork(nn.Module):
    """A residual network down to stride 16 and back up to stride 4, with one head for everything at a cell."""

    def __init__(self, config: JudgeConfig) -> None:
        super().__init__()
        self.config = config
        fine, middle, coarse = config.channels
        patch = nn.PixelUnshuffle(STRIDE)  # (N, 3, size, size) -> (N, 48, size/4, size/4)
        self.stem = nn.Sequential(patch, _conv(3 * STRIDE**2, fine), *_blocks(fine, config.blocks[0]))
        self.middle = nn.Sequential(_conv(fine, middle, stride=2), *_blocks(middle, config.blocks[1]))
        self.coarse = nn.Sequential(_conv(middle, coarse, stride=2), *_blocks(coarse, config.blocks[2]))
        self.coarse_to_middle = _conv(coarse, middle, kernel=1)
        self.merge_middle = Block(middle)
        self.middle_to_fine = _conv(middle, fine, kernel=1)
        self.merge_fine = _conv(fine, middle)
        self.up = nn.Upsample(scale_factor=2)
        self.heads = (1, len(config.nouns) + config.unknown, len(config.colours) + 1, 4)
        self.cell = nn.Conv2d(middle, sum(self.heads), 1)
        self.background = nn.Linear(fine + coarse, len(config.backgrounds))
        nn.init.constant_(self.cell.bias[:1], -4.0)  # most cells hold no centre

    def forward(self, images: Tensor) -> JudgeOutput:
        """Look at images (N, 3, size, size) in [-1, 1]."""
        fine = self.stem(images)  # (N, fine, size/4, size/4)
        middle = self.middle(fine)
        coarse = self.coarse(middle)
        middle = self.merge_middle(middle + self.up(self.coarse_to_middle(coarse)))
        cells = self.cell(self.merge_fine(fine + self.up(self.middle_to_fine(middle))))  # (N, all heads, h, w)
        pooled = torch.cat([fine.mean((2, 3)), coarse.mean((2, 3))], dim=1)
        centre, noun, colour, box = cells.float().split(self.heads, dim=1)
        return JudgeOutput(centre[:, 0], noun, colour, box, self.background(pooled).float())


class Block(nn.Module):
    """x + two 3x3 convolutions (He et al. 2016)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(_conv(channels, channels), _conv(channels, channels, activate=False))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.inner(x))


def _conv(inputs: int, outputs: int, *, kernel: int = 3, stride: int = 1, activate: bool = True) -> nn.Sequential:
    layers = [nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(outputs)]
    return nn.Sequential(*layers, *([nn.ReLU(inplace=True)] if activate else []))


def _blocks(channels: int, count: int) -> list[Block]:
    return [Block(channels) for _ in range(count)]
