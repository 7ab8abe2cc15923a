"""What of an image the model does not see, put back into results: its transparency, and that its colours were converted.

The model sees an image on white. A result that is to have alpha a again gets the colours that on white look as the model
left them: c = (r - (1 - a) white) / a.
"""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageCms

from latentdiff.reading.colours import Colours

Margins = tuple[int, int, int, int]  # left, top, right, bottom in pixels


def finished(
    result: Image.Image, source: Colours, area: Image.Image | None = None, margins: Margins = (0, 0, 0, 0)
) -> Image.Image:
    """A result as transparent as the image that it was made from, of a known profile if that one had another.

    Args:
        result: RGB; the source at any size, or what it has become with `margins` added.
        area: L, of the result's size, white where it was painted: there it is opaque. Where it is black, every pixel is
            that of the source, under transparent parts too. None keeps the transparency, at the result's size.
    """
    if source.alpha is not None:
        result = _with_alpha(result, source, area, margins)
    if source.is_converted:
        result.info["icc_profile"] = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    return result


def _with_alpha(result: Image.Image, source: Colours, area: Image.Image | None, margins: Margins) -> Image.Image:
    assert source.alpha is not None
    if area is None:
        alpha = np.asarray(source.alpha.resize(result.size, Image.Resampling.LANCZOS))
        return _under(result, alpha)
    left, top, right, bottom = margins
    before = np.dstack([np.asarray(source.rgb), np.asarray(source.alpha)])  # (h, w, 4)
    before = np.pad(before, ((top, bottom), (left, right), (0, 0)), mode="edge")  # (H, W, 4)
    painted = np.asarray(area) / 255.0
    alpha = (255.0 * painted + (1.0 - painted) * before[..., 3]).round().astype(np.uint8)
    after = np.asarray(_under(result, alpha))
    return Image.fromarray(np.where((painted > 0.0)[..., None], after, before))


def _under(result: Image.Image, alpha: np.ndarray) -> Image.Image:
    """RGBA of this alpha (H, W) that looks on white as the result does; where it is clear, with the result's colours."""
    share = np.where(alpha, alpha, 255)[..., None] / 255.0
    colours = (np.asarray(result) - (1.0 - share) * 255.0) / share
    return Image.fromarray(np.dstack([colours.round().clip(0, 255).astype(np.uint8), alpha]))
