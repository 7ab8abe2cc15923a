"""From a decoded image to the pixels of its bucket: scaled to cover it and cropped; and to numbers."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from latentdiff.training.data.buckets import Size
from latentdiff.training.data.randomness import Key, generator

CropKey = Key | None  # what the place of a random crop depends on; None is a crop of the middle


def prepare(
    image: Image.Image, bucket: Size, crop_key: CropKey = None, *, like: Size | None = None
) -> np.ndarray:
    """Scale an image so that it just covers its bucket, with Lanczos resampling, and cut off what stands out.

    A bucket from `buckets.assign` is never larger than the image unless upscaling was asked for there.

    Args:
        image: RGB.
        bucket: width and height in pixels.
        crop_key: see `CropKey`.
        like: the size of another image of these proportions, whose part is taken.

    Returns:
        (H, W, 3) uint8.
    """
    width, height = like or image.size
    scale, (left, top) = placed((width, height), bucket, crop_key)
    window = tuple(side / scale for side in bucket)  # what is kept, in pixels of the image
    if scale == 1:
        left, top = int(left), int(top)  # so that pixels are copied, not resampled
    box = (left, top, min(left + window[0], width), min(top + window[1], height))
    if (width, height) != image.size:
        box = tuple(side * own / whole for side, own, whole in zip(box, image.size * 2, (width, height) * 2, strict=True))
    if image.size != bucket or box != (0, 0, *image.size):
        image = image.resize(bucket, Image.Resampling.LANCZOS, box=box)
    return np.array(image)


def placed(size: Size, bucket: Size, crop_key: CropKey) -> tuple[float, tuple[float, float]]:
    """How far an image of this size is scaled to cover its bucket, and (left, top) of the crop in pixels of the image."""
    scale = max(bucket[0] / size[0], bucket[1] / size[1])
    slack = [max(0.0, side - own / scale) for side, own in zip(size, bucket, strict=True)]
    share = (0.5, 0.5) if crop_key is None else generator(*crop_key).random(2)
    left, top = (room * part for room, part in zip(slack, share, strict=True))
    return scale, (left, top)


def told_sizes(size: Size, bucket: Size, crop_key: CropKey, *, flipped: bool) -> tuple[int, ...]:
    """What SDXL is told of a training image (Podell et al. 2023, section 2.2; see `networks.sizes`), in the order of
    `SizeOptions`: its own height and width, top and left of the crop once it is scaled, and the bucket's height and width.

    Args:
        crop_key: as `prepare` got it.
        flipped: the crop is mirrored, as if the image had been before.
    """
    scale, (left, top) = placed(size, bucket, crop_key)
    if flipped:
        left = max(0.0, size[0] - bucket[0] / scale) - left
    return size[1], size[0], round(top * scale), round(left * scale), bucket[1], bucket[0]


def to_signed(images: Tensor) -> Tensor:
    """(N, H, W, 3) uint8 -> (N, 3, H, W) float32 in [-1, 1], channels last in memory."""
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1


def to_unsigned(images: Tensor) -> Tensor:
    """(N, H, W, 3) uint8 -> (N, 3, H, W) float32 in [0, 1], channels last in memory, as ControlNets see hints."""
    return images.permute(0, 3, 1, 2).float() / 255


def to_bytes(images: Tensor) -> Tensor:
    """Images of any layout in [-1, 1] -> uint8."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
