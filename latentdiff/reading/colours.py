"""Any image of Pillow as models see it: upright, in sRGB, 8 bits a channel, with its transparency apart."""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageCms

from latentdiff.errors import DataError
from latentdiff.reading.images import DAMAGED

_ORIENTATION = 0x0112  # EXIF tag; what each value asks for to stand upright (CIPA DC-008, 4.6.5)
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SPACES = {"L": "GRAY", "RGB": "RGB", "CMYK": "CMYK"}  # what ICC calls the colours of a mode
_AMBIGUOUS = 16.0  # floats between 1 and this are no levels of 255, and too high for shares of 1


@dataclass(frozen=True)
class Colours:
    """An image, upright.

    Attributes:
        rgb: RGB in sRGB, what lies under transparent parts too.
        alpha: L, 0 where it is transparent; None if it is opaque all over.
        is_converted: it came with a colour profile other than sRGB.
    """

    rgb: Image.Image
    alpha: Image.Image | None = None
    is_converted: bool = False

    def on(self, background: str) -> Image.Image:
        """RGB, laid over a colour as CSS names it."""
        if self.alpha is None:
            return self.rgb
        layer = self.rgb.copy()
        layer.putalpha(self.alpha)
        return Image.alpha_composite(Image.new("RGBA", layer.size, background), layer).convert("RGB")


def colours_of(image: Image.Image, name: str = "the image") -> Colours:
    """The colours and the transparency of an image; of an animation those of the first frame.

    Colour profiles are converted to sRGB, the EXIF orientation is applied, 16 bits a channel and floats are scaled.

    Args:
        name: for messages.

    Raises:
        DataError: its numbers are none of 8 or 16 bits or shares of 1, or not finite.
    """
    profile = image.info.get("icc_profile")
    image = as_8_bit(upright(image), name)
    alpha = None
    if image.mode == "1":
        image = image.convert("L")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        alpha = layer.getchannel("A") if layer.getextrema()[3][0] < 255 else None
        image = image.getchannel("L") if image.mode == "LA" else layer.convert("RGB")
    elif image.mode == "P":
        image = image.convert("RGB")
    converted = _converted(image, profile)
    return Colours(converted or image.convert("RGB"), alpha, converted is not None)


def as_rgb(image: Image.Image, background: str = "white", name: str = "the image") -> Image.Image:
    """An image as the model sees it: upright, 8 bits, RGB in sRGB, transparency laid over a colour.

    Raises:
        DataError: see `colours_of`.
    """
    return colours_of(image, name).on(background)


def upright(image: Image.Image) -> Image.Image:
    """An image turned as its EXIF orientation says."""
    image.load()  # after which Pillow has turned a TIFF
    turn = _UPRIGHT.get(orientation(image))
    return image if turn is None else image.transpose(turn)


def orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8, of an image that is loaded; 1 where the EXIF data are broken, as they often are."""
    try:
        # Of the base class: that of PNG files decodes the whole image to look behind it.
        return int(Image.Image.getexif(image).get(_ORIENTATION, 1))
    except DAMAGED:
        return 1


def as_8_bit(image: Image.Image, name: str = "the image") -> Image.Image:
    """An image of one channel with more bits, or of floats, as L, where Pillow would clip; others as they are.

    Raises:
        DataError: the numbers are not finite, or of no known range.
    """
    if image.mode not in ("I", "F") and not image.mode.startswith("I;16"):
        return image
    values = np.asarray(image).astype(np.float64)  # (H, W)
    levels = values * (255.0 / _largest(image.mode, values, name))
    return Image.fromarray(levels.round().astype(np.uint8))


def _largest(mode: str, values: np.ndarray, name: str) -> float:
    """The value that means white."""
    low, high = float(values.min(initial=0.0)), float(values.max(initial=0.0))
    if not np.isfinite(values).all():
        raise DataError(f"{name} holds floating-point numbers that are not finite (NaN or infinity); repair it first")
    unclear = mode == "F" and 1.0 < high < _AMBIGUOUS
    if low < 0.0 or high > 65535.0 or unclear:
        raise DataError(
            f"expected values of 0 to 1 as floats, 0 to 255 or 0 to 65535 in {name}, found {low:g} to {high:g}; scale it, and "
            "save it with 8 or 16 bits"
        )
    if mode == "F" and high <= 1.0:
        return 1.0
    return 65535.0 if mode.startswith("I;16") or high > 255.0 else 255.0


def _converted(image: Image.Image, profile: bytes | None) -> Image.Image | None:
    """The image in sRGB by its profile; None without one, with sRGB, and if it is broken or for another kind of image."""
    if image.mode == "LAB":
        return _by_profile(image, ImageCms.createProfile("LAB"))
    if not profile:
        return None
    try:
        given = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if given.profile.xcolor_space.strip() != _SPACES.get(image.mode) or "sRGB" in ImageCms.getProfileDescription(
            given
        ):
            return None
        return _by_profile(image, given)
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return None


def _by_profile(image: Image.Image, given: ImageCms.ImageCmsProfile | ImageCms.core.CmsProfile) -> Image.Image | None:
    return ImageCms.profileToProfile(image, given, ImageCms.createProfile("sRGB"), outputMode="RGB")
