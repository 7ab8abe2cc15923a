"""Masks of inpainting: grey images, white where to paint, black where to keep, grey in between."""

from __future__ import annotations

import math

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor
from torch.nn import functional as F

from latentdiff.errors import UsageError
from latentdiff.reading.colours import as_8_bit, colours_of, upright

_GREY = 64  # levels by which the channels of a grey mask may differ: a JPEG's differ a little
Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels


def read_mask(image: Image.Image, name: str = "the mask", *, invert: bool = False) -> Image.Image:
    """A mask as programs write them, as L: white where to paint, black where to keep, grey in between.

    Grey images are taken as they are, those of the values 0 and 1 as black and white. Where parts are transparent and
    the others are no mask of themselves (an image, or black), it is the transparent parts that are painted, as in
    OpenAI's interface.

    Args:
        name: for messages.
        invert: what says paint says keep, and the other way round.

    Raises:
        UsageError: it is no mask, or could be read in two ways.
    """
    colours = colours_of(_of_8_bits(image, name), name)
    pixels = np.asarray(colours.rgb).astype(np.int16)  # (H, W, 3)
    alpha = None if colours.alpha is None else np.asarray(colours.alpha)
    shown = pixels if alpha is None else pixels[alpha > 0]
    is_grey = shown.size == 0 or int(np.ptp(shown, axis=-1).max()) <= _GREY
    if alpha is not None:
        if is_grey and (shown.size == 0 or shown.max() > 127):
            raise UsageError(
                f"{name} is white or grey on a transparent ground, read in opposite ways by programs: lay it on black to paint "
                "what is white, or make its opaque parts black to paint what is transparent"
            )
        grey = 255 - alpha
    elif is_grey:
        grey = np.asarray(colours.rgb.convert("L"))
        grey = grey * 255 if grey.max() == 1 else grey
    else:
        raise UsageError(
            f"{name} has colours: expected a grey image, white where to paint, or one with transparent parts there; "
            "is it the image?"
        )
    return Image.fromarray(255 - grey if invert else grey)


def _of_8_bits(image: Image.Image, name: str) -> Image.Image:
    """The image upright, without its colour profile, which means nothing in masks; the values 0 and 1 of more bits as
    0 and 255."""
    image = upright(image).copy()
    image.info = {key: value for key, value in image.info.items() if key == "transparency"}
    if image.mode == "I" or image.mode.startswith("I;16"):
        values = np.asarray(image)
        return Image.fromarray((values * 255).astype(np.uint8)) if values.max() == 1 else as_8_bit(image, name)
    return image


def prepared_mask(mask: Image.Image, size: tuple[int, int], *, grow: int, blur: float) -> Image.Image:
    """A mask of `read_mask`, of (width, height) `size`, grown, then blurred.

    Args:
        grow: pixels by which the painted area is widened on all sides.
        blur: standard deviation in pixels of the Gaussian that softens its edge.

    Raises:
        UsageError: another size than that of the image, nothing to paint, or a negative growth or blur.
    """
    if grow < 0:
        raise UsageError(f"expected a mask growth of 0 or more pixels, found {grow}")
    if not (math.isfinite(blur) and blur >= 0):
        raise UsageError(f"expected a mask blur of 0 or more pixels, found {blur}")
    if mask.size != size:
        raise UsageError(
            f"expected a mask of the image's size, {size[0]} x {size[1]} pixels, found {mask.width} x {mask.height}"
        )
    if mask.getbbox() is None:
        raise UsageError(
            "the mask is empty: expected white where to paint and black where to keep, found only black; to take it the other "
            "way round, invert it (invert_mask, --invert-mask)"
        )
    if grow:
        mask = _grown(mask, grow)
    return mask.filter(ImageFilter.GaussianBlur(blur)) if blur else mask


def latent_mask(mask: Image.Image, factor: int) -> Tensor:
    """The mask for latents, (1, 1, h, w) in [0, 1]: each cell takes the largest value of its pixels.

    So a cell that holds any pixel to be painted is painted, and nothing of what is to go is left at the rim. Cells that
    reach beyond the image count what lies inside.
    """
    values = torch.from_numpy(np.array(mask, dtype=np.float32) / 255.0)[None, None]  # (1, 1, H, W)
    right, bottom = -mask.width % factor, -mask.height % factor
    return F.max_pool2d(F.pad(values, (0, right, 0, bottom)), factor)


def mean_mask(mask: Image.Image, factor: int) -> Tensor:
    """The mask for latents, (1, 1, h, w) in [0, 1]: each cell takes the mean of its pixels, of those that lie inside."""
    values = torch.from_numpy(np.array(mask, dtype=np.float32) / 255.0)[None, None]  # (1, 1, H, W)
    return F.avg_pool2d(values, factor, ceil_mode=True, count_include_pad=False)


def composed(image: Image.Image, painted: Image.Image, mask: Image.Image) -> Image.Image:
    """`painted` where the mask is white and `image` where it is black, to the last bit; the weighted mean in
    between."""
    weight = np.asarray(mask, dtype=np.float64)[..., None] / 255.0  # (H, W, 1)
    mixed = weight * np.asarray(painted) + (1.0 - weight) * np.asarray(image)
    return Image.fromarray(mixed.round().astype(np.uint8))


def filled(image: Image.Image, mask: Image.Image) -> Image.Image:
    """The image with every pixel of the mask that is not black replaced by a smooth mean of the kept ones around it.

    Pull and push (Gortler et al. 1996, section 3.5): means of the kept pixels over ever larger blocks, from which the
    finer ones take what they lack.

    Raises:
        UsageError: the mask leaves nothing to take the place of what it covers.
    """
    kept = torch.from_numpy(np.asarray(mask) == 0)[None, None].double()  # (1, 1, H, W)
    if not kept.any():
        raise UsageError(
            "expected a mask that leaves something of the image to fill the rest from, found one without any black"
        )
    colours = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)[None].double()  # (1, 3, H, W)
    smooth = pulled_and_pushed(colours * kept, kept)
    return Image.fromarray(smooth[0].permute(1, 2, 0).round().clamp(0, 255).byte().numpy())


def pulled_and_pushed(weighted: Tensor, weight: Tensor) -> Tensor:
    """Colours (N, 3, H, W) from weighted ones and their weights (1, 1, H, W) in [0, 1], not all 0; see `filled`."""
    height, width = weight.shape[-2:]
    if height == width == 1:
        return weighted / weight
    even = (0, width % 2, 0, height % 2)
    sums = 4.0 * F.avg_pool2d(F.pad(weighted, even), 2)
    weights = 4.0 * F.avg_pool2d(F.pad(weight, even), 2)
    share = weights.clamp(max=1.0) / weights.clamp(min=1e-12)  # a block that is known well enough counts as one
    coarse = pulled_and_pushed(sums * share, weights * share)
    finer = F.interpolate(coarse, scale_factor=2, mode="bilinear", align_corners=False)[..., :height, :width]
    return weighted + (1.0 - weight) * finer


def surroundings(mask: Image.Image, padding: int) -> Box:
    """The painted area with `padding` pixels around it, widened to a square as far as the image allows."""
    left, top, right, bottom = mask.getbbox()
    left, top = max(0, left - padding), max(0, top - padding)
    right, bottom = min(mask.width, right + padding), min(mask.height, bottom + padding)
    side = max(right - left, bottom - top)
    left, right = _widened(left, right, side, mask.width)
    top, bottom = _widened(top, bottom, side, mask.height)
    return left, top, right, bottom


def _widened(first: int, last: int, length: int, limit: int) -> tuple[int, int]:
    """An interval of up to `length` around the one from `first` to `last`, shifted to lie between 0 and `limit`."""
    length = min(length, limit)
    first = min(max(0, first - (length - (last - first)) // 2), limit - length)
    return first, first + length


def _grown(mask: Image.Image, pixels: int) -> Image.Image:
    values = torch.from_numpy(np.array(mask, dtype=np.float32))[None]  # (1, H, W)
    window = 2 * pixels + 1
    values = F.max_pool2d(values, (window, 1), stride=1, padding=(pixels, 0))
    values = F.max_pool2d(values, (1, window), stride=1, padding=(0, pixels))
    return Image.fromarray(values[0].numpy().astype(np.uint8))
