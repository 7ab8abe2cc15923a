"""How strongly an adapter acts: on the U-Net and on the text encoder, and block by block.

The grammar of the command line, parts separated by commas:

    0.8                          everything
    unet=0.8,te=0.4              apart for U-Net and text encoder
    0.8,blocks=1,0,0,...,1       also times a number for each block, as the web UIs' block weights list them

A list has a base, which the text encoder and layers outside of all blocks take, and the blocks IN00 ... M00 ... OUT11
(26 numbers), or the same without a base (25), or only the 17 that a LoRA of attention has.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from numbers import Real
from typing import Self

from latentdiff.errors import UsageError
from latentdiff.networks.config import UNetConfig

_GRAMMAR = (
    "expected a strength such as 0.8, or unet=0.8,te=0.4, or 0.8,blocks=1,0,... with 17, 25 or 26 numbers "
    "(base, then IN, M and OUT blocks)"
)
_SIDE = 12  # blocks on each side of the published U-Nets
_OF_ATTENTION = (0, 2, 3, 5, 6, 8, 9, 13, *range(17, 26))  # places of 17 numbers among 26; the others are 0
_BLOCK = re.compile(r"unet\.(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.")


@dataclass(frozen=True)
class Strength:
    """Numbers by which an adapter's changes are multiplied; 1 is as trained.

    Attributes:
        unet, text_encoder: of all layers of a part.
        blocks: of base, IN, M and OUT blocks besides; empty is 1 for all.
    """

    unet: float = 1.0
    text_encoder: float = 1.0
    blocks: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        for number in (self.unet, self.text_encoder, *self.blocks):
            if isinstance(number, bool) or not isinstance(number, Real) or not math.isfinite(number):
                raise UsageError(f"expected a finite LoRA scale, found {number!r}")

    @classmethod
    def of(cls, given: float | str | Strength) -> Strength:
        """A strength from a number, from text (see this file's head), or itself.

        Raises:
            UsageError: it is none.
        """
        if isinstance(given, Strength):
            return given
        if isinstance(given, str):
            return cls.parse(given)
        return cls(float(cls(given).unet), float(given))

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read text as this file's head says.

        Raises:
            UsageError: it is not written so.
        """
        values: dict[str, list[str]] = {"": []}
        name = ""
        for piece in text.split(","):
            key, equals, value = piece.partition("=")
            if equals:
                name = key.strip()
                if name not in ("unet", "te", "blocks") or name in values:
                    raise UsageError(f"{_GRAMMAR}; found {text!r}")
                values[name] = [value]
            else:
                values[name].append(piece)
        try:
            numbers = {name: [float(piece) for piece in pieces] for name, pieces in values.items()}
            (both,) = numbers.pop("") or [1.0]
            blocks = _whole(numbers.pop("blocks", []))
            (unet,), (text_encoder,) = numbers.get("unet", [both]), numbers.get("te", [both])
        except ValueError as error:
            raise UsageError(f"{_GRAMMAR}; found {text!r}") from error
        return cls(unet, text_encoder, blocks)

    def __str__(self) -> str:
        """As `parse` reads it."""
        parts = f"{self.unet:g}" if self.unet == self.text_encoder else f"unet={self.unet:g},te={self.text_encoder:g}"
        return parts + (",blocks=" + ",".join(f"{number:g}" for number in self.blocks) if self.blocks else "")

    @property
    def as_json(self) -> float | str:
        """A number where one says it all."""
        return self.unet if self.unet == self.text_encoder and not self.blocks else str(self)

    def check(self, config: UNetConfig) -> None:
        """Raise a UsageError if the list of blocks is not one for this U-Net."""
        own = len(config.block_out_channels) * (config.layers_per_block + 1)
        if self.blocks and own != _SIDE:
            raise UsageError(f"block strengths are for U-Nets of 12 + 1 + 12 blocks, this one has {own} + 1 + {own}")

    def at(self, name: str, layers_per_block: int) -> float:
        """Of one layer, by its full name."""
        base = self.blocks[0] if self.blocks else 1.0
        if name.startswith(("text_encoder.", "text_encoder_2.")):
            return self.text_encoder * base
        place = _place(name, layers_per_block) if self.blocks else None
        return self.unet * (base if place is None else self.blocks[place])


def _whole(numbers: list[float]) -> tuple[float, ...]:
    """26 numbers of those that are given."""
    if len(numbers) == 17:
        given = dict(zip(_OF_ATTENTION, numbers, strict=True))
        return tuple(given.get(place, 0.0) for place in range(26))
    if len(numbers) == 25:
        return (1.0, *numbers)
    if len(numbers) not in (0, 26):
        raise ValueError
    return tuple(numbers)


def _place(name: str, layers: int) -> int | None:
    """Where a layer's block stands in a list of 26; None outside of all blocks."""
    if name.startswith("unet.conv_in"):
        return 1
    if name.startswith("unet.mid_block."):
        return 2 + _SIDE - 1
    if not (match := _BLOCK.match(name)):
        return None
    level, number = int(match[2]), int(match[4])
    if match[1] == "down":
        return 1 + (level + 1) * (layers + 1) if match[3] == "downsamplers" else 2 + level * (layers + 1) + number
    return 2 + _SIDE + level * (layers + 1) + (layers if match[3] == "upsamplers" else number)
