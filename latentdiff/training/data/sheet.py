"""A contact sheet of what training sees: the tensors, decoded back, and beside each what the VAE makes of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image
from torch import Tensor

from latentdiff.image import contact_sheet, psnr, to_pil, to_tensor
from latentdiff.training.data.buckets import Size
from latentdiff.training.data.dataset import Dataset
from latentdiff.training.data.transforms import prepare

_GAP = 4  # pixels between the two halves of a cell
_WIDEST = 2400  # pixels of the sheet


def training_sheet(
    data: Dataset, buckets: Sequence[Size | None], reconstruct: Callable[[Tensor], Tensor], *, count: int = 16
) -> tuple[Image.Image, float]:
    """Draw images spread evenly over the data set, each as its tensor and as the VAE gives it back.

    Args:
        data: the images.
        buckets: of each image, see `buckets.assign`; those without are not drawn.
        reconstruct: images (1, 3, H, W) in [-1, 1] -> the same through the VAE.
        count: the most images on the sheet.

    Returns:
        The sheet, and the mean PSNR of the reconstructions in decibels.
    """
    usable = [index for index, bucket in enumerate(buckets) if bucket is not None]
    chosen = [usable[place * len(usable) // count] for place in range(count)] if len(usable) > count else usable
    pairs = [_pair(data, index, buckets[index], reconstruct) for index in chosen]
    side = max(max(image.size) for pair in pairs for image in pair)
    cells = [_cell(pair, side) for pair in pairs]
    captions = [f"{data.names[index]}: {data.captions[index][0]}" for index in chosen]
    columns = max(1, min(4, _WIDEST // cells[0].width))
    return contact_sheet(cells, captions, columns=columns), float(np.mean([psnr(*pair) for pair in pairs]))


def _pair(
    data: Dataset, index: int, bucket: Size | None, reconstruct: Callable[[Tensor], Tensor]
) -> tuple[Image.Image, Image.Image]:
    assert bucket is not None
    tensor = to_tensor([Image.fromarray(prepare(data.load(index), bucket))])  # (1, 3, H, W)
    return to_pil(tensor)[0], to_pil(reconstruct(tensor))[0]


def _cell(pair: tuple[Image.Image, Image.Image], side: int) -> Image.Image:
    cell = Image.new("RGB", (2 * side + _GAP, side), "lightgrey")
    for place, image in enumerate(pair):
        cell.paste(image, (place * (side + _GAP) + (side - image.width) // 2, (side - image.height) // 2))
    return cell
