"""Where in an image errors count: masks of training, cropped and mirrored as their images are."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image

from latentdiff.training.data import Dataset
from latentdiff.training.data.buckets import Size
from latentdiff.training.data.entries import FileOrigin
from latentdiff.training.data.hint_files import hint_files
from latentdiff.training.data.images import read_alpha, read_image
from latentdiff.training.data.transforms import CropKey, prepare
from latentdiff.training.store import row_key

ALPHA = "alpha"


@dataclass(frozen=True)
class Masks:
    """Masks of the images of a data set, by their indices.

    Attributes:
        data: the images.
        outside: what errors count where a mask is black; where it is white they count 1.
        files: the mask of each; without them, what is transparent is outside.
    """

    data: Dataset
    outside: float
    files: tuple[Path, ...] = ()

    @classmethod
    def find(cls, data: Dataset, place: str | None, outside: float) -> Masks | None:
        """Those that a configuration asks for: "alpha", or see `hint_files`; None without a place."""
        if place is None:
            return None
        return cls(data, outside, () if place == ALPHA else tuple(hint_files(data, place, "mask")))

    def weights(self, index: int, bucket: Size, crop_key: CropKey, downscale: int) -> np.ndarray:
        """What errors of each latent count, (1, h, w) float32: means over the pixels that it stands for.

        Args:
            crop_key: that of the image; where the crop lies depends on it.
            downscale: pixels per latent, along each side.

        Raises:
            DataError: the mask cannot be read; the message names it.
        """
        mask = self.pixels(index, bucket, crop_key)
        height, width = (side // downscale for side in mask.shape)
        share = mask.reshape(height, downscale, width, downscale).mean((1, 3)) / 255
        return (self.outside + (1 - self.outside) * share)[None].astype(np.float32)

    def pixels(self, index: int, bucket: Size, crop_key: CropKey) -> np.ndarray:
        """The mask of an image in its bucket, (H, W) uint8; see `weights`."""
        return prepare(self._mask(index), bucket, crop_key, like=self.data.sizes[index])[..., 0]

    def _mask(self, index: int) -> Image.Image:
        if self.files:
            return read_image(self.files[index], str(self.files[index]))
        entry = self.data.entries[index]
        return read_alpha(entry.origin.source(), entry.name)

    @cached_property
    def fingerprint(self) -> str:
        """Changes when a mask does. 16 hex digits."""
        return row_key(str(self.outside), *(FileOrigin(file).stamp() for file in self.files))[:16]
