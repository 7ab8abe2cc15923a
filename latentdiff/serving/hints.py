"""Images that were sent, at the size of what is made; and the hints that ControlNets follow. Loads no torch."""

from __future__ import annotations

from PIL import Image, ImageOps

from latentdiff.adapters.control.preparation import prepared
from latentdiff.reading.colours import as_rgb, upright
from latentdiff.reading.images import opened
from latentdiff.serving.work import Fit, Following, Sent

Size = tuple[int, int]  # width, height in pixels


def opened_image(sent: Sent, name: str) -> Image.Image:
    """An image that was sent, upright.

    Raises:
        DataError: it is none.
    """
    with opened(sent.file, name) as image:
        image.load()
        return upright(image)


def fitted(image: Image.Image, fit: Fit, size: Size) -> Image.Image:
    """The image at a size, as L, RGB or RGBA: stretched, cut at two sides, or with black at two sides."""
    if image.size == size:
        return image
    image = image if image.mode in ("L", "RGB", "RGBA") else as_rgb(image)
    if fit == "crop":
        return ImageOps.fit(image, size, Image.Resampling.LANCZOS)
    if fit == "pad":
        return ImageOps.pad(image, size, Image.Resampling.LANCZOS)
    return image.resize(size, Image.Resampling.LANCZOS)


def hint(following: Following, size: Size) -> Image.Image:
    """What the ControlNet sees, prepared, then brought to the size of what is made.

    Raises:
        DataError: what was sent is no image.
        UsageError: an option of the preparation is outside its domain.
        MissingDependencyError: what prepares it is not installed.
    """
    image = as_rgb(opened_image(following.image, "the image of a control"))
    if following.prepare is not None:
        if following.resolution is not None:
            image = at_resolution(image, following.resolution)
        image = prepared(image, following.prepare, **following.preparation)
    return fitted(image, following.fit, size) if following.fit else image


def at_resolution(image: Image.Image, resolution: int) -> Image.Image:
    """The image with a shorter side of so many pixels."""
    factor = resolution / min(image.size)
    size = round(image.width * factor), round(image.height * factor)
    return image.resize(size, Image.Resampling.BOX if factor < 1.0 else Image.Resampling.BICUBIC)
