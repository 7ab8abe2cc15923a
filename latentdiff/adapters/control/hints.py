"""From an image to the hint that a ControlNet sees, at the size of the image that is made."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from latentdiff.errors import UsageError
from latentdiff.image import as_rgb

MASKED = -1.0  # what inpainting ControlNets see where they paint


def hint_tensor(image: Image.Image, mask: Image.Image | None, height: int, width: int, factor: int) -> Tensor:
    """The hint (1, 3, height, width), RGB from 0 to 1, and -1 where a mask is white.

    An image of another size is resized; one that lacks less than `factor` pixels of a side is extended by its last ones, as
    the images of tasks are.

    Raises:
        UsageError: its sides are in another proportion, by more than `factor` pixels; or the mask has another size.
    """
    image, mask = as_rgb(image), None if mask is None else as_rgb(mask)
    if mask is not None and mask.size != image.size:
        raise UsageError(
            f"expected the mask of a control at its image's size, {image.width} x {image.height}, found {mask.width} x "
            f"{mask.height}"
        )
    if abs(image.height * width / image.width - height) > factor:
        raise UsageError(
            f"expected the image of a control in the proportions of what is made, {width} x {height} pixels, found "
            f"{image.width} x {image.height}; crop it, or give --width and --height"
        )
    hint = _sized(image, height, width, factor, Image.Resampling.LANCZOS) / 255.0  # (H, W, 3)
    if mask is not None:
        hidden = _sized(mask.convert("L"), height, width, factor, Image.Resampling.NEAREST) > 127
        hint[hidden] = MASKED
    return torch.from_numpy(hint).permute(2, 0, 1)[None]


def _sized(image: Image.Image, height: int, width: int, factor: int, how: Image.Resampling) -> np.ndarray:
    right, bottom = width - image.width, height - image.height
    if 0 <= right < factor and 0 <= bottom < factor:
        values = np.asarray(image, dtype=np.float32)
        return np.pad(values, ((0, bottom), (0, right), (0, 0))[: values.ndim], mode="edge")
    return np.array(image.resize((width, height), how), dtype=np.float32)
