"""The hints that a ControlNet is trained to follow, as training sees them: cropped and mirrored as their images are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image

from latentdiff.adapters.control.preparation import prepared
from latentdiff.training.data import Dataset
from latentdiff.training.data.buckets import Size
from latentdiff.training.data.entries import FileOrigin
from latentdiff.training.data.hint_files import hint_files
from latentdiff.training.data.images import read_image
from latentdiff.training.data.transforms import CropKey, prepare
from latentdiff.training.store import row_key


@dataclass(frozen=True)
class Hints:
    """Hints of the images of a data set, by their indices.

    Attributes:
        data: the images.
        files: the hint of each.
        kind: in place of files, the preparation that makes the hint of an image as training sees it.
    """

    data: Dataset
    files: tuple[Path, ...] = ()
    kind: str | None = None

    @classmethod
    def find(cls, data: Dataset, place: str | None, kind: str | None) -> Hints:
        """Those that a configuration asks for; see `hint_files`."""
        return cls(data, kind=kind) if kind else cls(data, tuple(hint_files(data, place)))

    def pixels(self, index: int, bucket: Size, crop_key: CropKey, image: Callable[[], np.ndarray]) -> np.ndarray:
        """The hint of an image in its bucket, (H, W, 3) uint8.

        Args:
            crop_key: that of the image; where the crop lies depends on it.
            image: gives the image in its bucket, (H, W, 3) uint8.

        Raises:
            DataError: the hint cannot be read; the message names it.
        """
        if self.kind:
            return np.array(prepared(Image.fromarray(image()), self.kind))
        file = self.files[index]
        return prepare(read_image(file, str(file)), bucket, crop_key, like=self.data.sizes[index])

    @cached_property
    def fingerprint(self) -> str:
        """Changes when a hint does. 16 hex digits."""
        return row_key(self.kind or "", *(FileOrigin(file).stamp() for file in self.files))[:16]
