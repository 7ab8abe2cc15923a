"""The numbers that U-Nets of SDXL are told beside the text (Podell et al. 2023, section 2.2).

The base model is told (height, width) of the training image before it was brought to its size, (top, left) of the crop
and (height, width) of what was cropped; the refiner, in place of the last pair, how an aesthetic predictor likes the
image, 1 to 10.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from latentdiff.errors import CheckpointError
from latentdiff.networks.config import UNetConfig

OF_BASE, OF_REFINER = 6, 5


class Told(NamedTuple):
    """What the rows that follow the prompt are told, and those that avoid something; (1, K) for all, or (N, K)."""

    positive: Tensor
    negative: Tensor


@dataclass(frozen=True)
class SizeOptions:
    """What is told; None is the size of the image that is made.

    original_size, target_size: (height, width) in pixels.
    crop_top_left: (top, left) in pixels.
    aesthetic_score, negative_aesthetic_score: 1 to 10, of models that are told it.
    """

    original_size: tuple[int, int] | None = None
    crop_top_left: tuple[int, int] = (0, 0)
    target_size: tuple[int, int] | None = None
    aesthetic_score: float = 6.0
    negative_aesthetic_score: float = 2.5

    def told(self, count: int, height: int, width: int) -> Told:
        """For a U-Net that is told `count` numbers and an image of this size in pixels."""
        first = (*(self.original_size or (height, width)), *self.crop_top_left)
        if count == OF_REFINER:
            ends = (self.aesthetic_score,), (self.negative_aesthetic_score,)
        else:
            ends = (self.target_size or (height, width),) * 2
        return Told(*(torch.tensor([(*first, *end)], dtype=torch.float32) for end in ends))


def count_of_sizes(config: UNetConfig, pooled_width: int | None) -> int:
    """How many numbers a U-Net is told beside text that is pooled to this width; 0 for one that is told none.

    Raises:
        CheckpointError: the U-Net and the text encoder do not fit.
    """
    if config.added_dim is None and pooled_width is None:
        return 0
    if config.added_dim is None or pooled_width is None:
        needs = "pooled text, which this text encoder does not give" if pooled_width is None else "no pooled text"
        raise CheckpointError(f"the model's parts do not fit: the U-Net takes {needs}")
    count, rest = divmod(config.added_dim - pooled_width, config.size_dim)
    if rest or count not in (OF_BASE, OF_REFINER):
        raise CheckpointError(
            f"the model's parts do not fit: the U-Net is told {config.added_dim} numbers, expected {pooled_width} of pooled "
            f"text and {OF_BASE} (base) or {OF_REFINER} (refiner) sizes of {config.size_dim}"
        )
    return count
