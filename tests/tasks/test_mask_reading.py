"""Masks as programs write them: read right, or refused in a line that says what to do."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from latentdiff.errors import UsageError
from latentdiff.tasks import inpaint
from latentdiff.tasks.masks import read_mask
from tests import peers
from tests.reading.image_kinds import png_16, tiff
from tests.tasks.images import an_image, mask

HOLE = mask((8, 4, 20, 12), 32, 24)
PAINT = np.asarray(HOLE) == 255


def opened(content: bytes) -> Image.Image:
    return Image.open(io.BytesIO(content))


def with_alpha(image: Image.Image, alpha: np.ndarray) -> Image.Image:
    image = image.copy()
    image.putalpha(Image.fromarray((alpha * 255).astype(np.uint8)))
    return image


def jpeg(image: Image.Image) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=90)
    return opened(file.getvalue())


def palette(image: Image.Image, *colours: int) -> Image.Image:
    found = Image.fromarray((np.asarray(image) == 255).astype(np.uint8), "P")
    found.putpalette(colours)
    return found


MASKS = {
    "grey": HOLE,
    "one bit": HOLE.convert("1"),
    "RGB": HOLE.convert("RGB"),
    "opaque RGBA": HOLE.convert("RGBA"),
    "0 and 1": Image.fromarray(PAINT.astype(np.uint8)),
    "0 and 1 in RGB": Image.fromarray(np.dstack([PAINT] * 3).astype(np.uint8)),
    "0 and 1 of 16 bits": opened(png_16(PAINT.astype(np.uint16))),
    "0 and 1 of 32 bits": opened(tiff(PAINT.astype(np.int32))),
    "0 and 1 as floats": opened(tiff(PAINT.astype(np.float32))),
    "16 bits": opened(png_16((PAINT * 65535).astype(np.uint16))),
    "palette": palette(HOLE, 0, 0, 0, 255, 255, 255),
    "palette of 0 and 1": palette(HOLE, 0, 0, 0, 1, 1, 1),
    "an image with a hole": with_alpha(an_image(32, 24), ~PAINT),
    "black with a hole": with_alpha(Image.new("RGB", (32, 24)), ~PAINT),
    "grey and alpha": with_alpha(Image.new("L", (32, 24)), ~PAINT),
}


@pytest.mark.parametrize("name", MASKS)
def test_recognised(name):
    assert np.array_equal(np.asarray(read_mask(MASKS[name])), np.asarray(HOLE))
    assert np.array_equal(np.asarray(read_mask(MASKS[name], invert=True)), 255 - np.asarray(HOLE))


def test_grey_stays_and_jpeg_does():
    soft = Image.fromarray(np.tile(np.arange(0, 256, 8, dtype=np.uint8), (24, 1)))
    assert read_mask(soft).tobytes() == soft.tobytes()
    read = np.asarray(read_mask(jpeg(HOLE.convert("RGB")))).astype(int)
    assert np.abs(read - np.asarray(HOLE)).mean() < 4


def test_upright():
    turned = HOLE.transpose(Image.Transpose.ROTATE_90)
    turned.getexif()[0x0112] = 6
    assert np.array_equal(np.asarray(read_mask(turned)), np.asarray(HOLE))


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (an_image(32, 24), "m.png has colours: expected a grey image"),
        (palette(HOLE, 0, 0, 0, 128, 0, 0), "has colours"),
        (with_alpha(Image.new("RGB", (32, 24), "white"), PAINT), "opposite ways"),
        (with_alpha(HOLE.convert("RGB"), np.arange(32) < np.full((24, 1), 30)), "opposite ways"),
        (Image.new("RGBA", (32, 24), (255, 255, 255, 0)), "opposite ways"),
    ],
    ids=["image", "colours of classes", "strokes", "two masks in one", "nothing"],
)
def test_refused(image, reason):
    with pytest.raises(UsageError, match=reason) as error:
        read_mask(image, "m.png")
    assert "m.png" in str(error.value) and "\n" not in str(error.value)


def test_masks_of_one_value():
    pipe = peers.ours("sd1")
    options = {"steps": 1, "seed": 1, "progress": False}
    with pytest.raises(UsageError, match="only black; .* --invert-mask"):
        inpaint(pipe, an_image(), Image.new("L", (64, 64)), "cat", **options)
    with pytest.raises(UsageError, match="only black"):
        inpaint(pipe, an_image(), Image.new("L", (64, 64), 255), "cat", invert_mask=True, **options)
    with pytest.warns(UserWarning, match="white all over, so the whole image is repainted"):
        inpaint(pipe, an_image(), Image.new("L", (64, 64)), "cat", invert_mask=True, **options)
