"""One reader for editing and training: whatever an image is, it is read right or refused in a line."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
from PIL import Image, ImageCms

from latentdiff.errors import DataError
from latentdiff.image import open_image
from latentdiff.reading.colours import as_rgb, colours_of
from latentdiff.training.data.images import image_size, read_image
from tests.reading.image_kinds import adobe_profile, adobe_to_srgb, png_16, tiff

RAMP = np.linspace(0, 1, 48).reshape(6, 8)
LEVELS = (RAMP * 255).round()


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.fixture(params=["editing", "training"])
def read(request, tmp_path):
    """The pixels (H, W, 3) that a file has for editing and for training."""

    def run(content: bytes) -> np.ndarray:
        if request.param == "training":
            image = read_image(content, "a.tif")
        else:
            (tmp_path / "a.tif").write_bytes(content)
            image = as_rgb(open_image(tmp_path / "a.tif"), name="a.tif")
        assert image.mode == "RGB"
        return np.asarray(image).astype(int)

    return run


@pytest.mark.parametrize(
    ("content", "tolerance"),
    [
        (encoded(Image.fromarray(LEVELS.astype(np.uint8)), "PNG"), 0),
        (png_16((RAMP * 65535).round().astype(np.uint16)), 0),
        (png_16(np.dstack([RAMP * 65535, np.full_like(RAMP, 65535)]).round().astype(np.uint16)), 1),
        (png_16(np.dstack([RAMP * 65535] * 3).round().astype(np.uint16)), 1),
        (png_16(np.dstack([*[RAMP * 65535] * 3, np.full_like(RAMP, 65535)]).round().astype(np.uint16)), 1),
        (tiff((RAMP * 65535).round().astype(np.uint16)), 0),
        (tiff(np.dstack([RAMP * 65535] * 3).round().astype(np.uint16)), 1),
        (tiff(RAMP.astype(np.float32)), 0),
        (tiff(LEVELS.astype(np.float32)), 0),
        (tiff((RAMP * 65535).astype(np.float32)), 0),
        (tiff(LEVELS.astype(np.int32)), 0),
        (tiff((RAMP * 65535).round().astype(np.int32)), 0),
    ],
    ids=["8", "png16", "png16 LA", "png16 RGB", "png16 RGBA", "tiff16", "tiff16 RGB", "float 1", "float 255",
         "float 65535", "int32 255", "int32 65535"],
)  # fmt: skip
def test_bits(read, content, tolerance):
    assert np.abs(read(content) - LEVELS[..., None]).max() <= tolerance


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (tiff(np.where(RAMP > 0.5, math.nan, RAMP).astype(np.float32)), "a.tif holds .* not finite"),
        (tiff(np.where(RAMP > 0.5, math.inf, RAMP).astype(np.float32)), "not finite"),
        (tiff((RAMP * 1.5).astype(np.float32)), "0 to 1 as floats, .* in a.tif, found 0 to 1.5"),
        (tiff((RAMP - 0.5).astype(np.float32)), "found -0.5 to 0.5"),
        (tiff((RAMP * 1e6).astype(np.int32)), "found 0 to 1e\\+06"),
        (tiff(np.dstack([RAMP] * 3).astype(np.float32)), "several floats"),
        (b"\0\0\0\x18ftypheic" + bytes(40), "HEIC"),
    ],
    ids=["nan", "infinity", "1.5", "negative", "large", "float RGB", "heic"],
)
def test_refused_in_a_line(read, content, reason):
    with pytest.raises(DataError, match=reason) as error:
        read(content)
    assert "a.tif" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_profiles_are_converted(read, mode):
    colour = (120, 140, 90)
    image = Image.new("RGB", (8, 6), colour)
    image = image.quantize(4) if mode == "P" else image.convert(mode)
    seen = read(encoded(image, "PNG", icc_profile=adobe_profile()))
    assert np.abs(seen - adobe_to_srgb(colour)).max() <= 1.0
    assert np.abs(seen - colour).max() > 5
    assert colours_of(Image.open(io.BytesIO(encoded(image, "PNG", icc_profile=adobe_profile())))).is_converted


def test_profiles_that_mean_nothing(read):
    same = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB", 5000)).tobytes()
    for image in (Image.new("RGB", (4, 4), (120, 140, 90)), Image.new("L", (4, 4), 120)):
        for profile in (same, b"broken", lab, *([adobe_profile()] if image.mode == "L" else [])):
            assert (read(encoded(image, "PNG", icc_profile=profile)) == np.asarray(image.convert("RGB"))).all()


def test_cmyk_and_lab(read):
    assert (read(encoded(Image.new("CMYK", (4, 4), (0, 255, 255, 0)), "TIFF")) == (255, 0, 0)).all()
    assert (read(encoded(Image.new("CMYK", (4, 4), (0, 255, 255, 0)), "JPEG")) - (255, 0, 0)).max() <= 2
    to_lab = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")
    image = Image.new("RGB", (4, 4), (120, 140, 90))
    assert np.abs(read(encoded(ImageCms.applyTransform(image, to_lab), "TIFF")) - (120, 140, 90)).max() <= 2


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP"])
@pytest.mark.parametrize("turn", range(1, 9))
def test_upright(read, kind, turn):
    """Once, whoever turns it: Pillow turns TIFF files itself."""
    image = Image.new("RGB", (16, 8), "white")
    image.paste("black", (0, 0, 8, 4))  # the first corner
    exif = Image.Exif()
    exif[0x0112] = turn
    content = encoded(image, kind, exif=exif)
    dark = read(content).mean(axis=-1) < 128
    assert dark.shape == ((8, 16) if turn < 5 else (16, 8)) == image_size(content, "x")[::-1]
    rows, columns = np.nonzero(dark)
    corner = rows.mean() < dark.shape[0] / 2, columns.mean() < dark.shape[1] / 2
    top_left = {1: (1, 1), 2: (1, 0), 3: (0, 0), 4: (0, 1), 5: (1, 1), 6: (1, 0), 7: (0, 0), 8: (0, 1)}
    assert corner == tuple(map(bool, top_left[turn]))


def test_transparency_stays_apart():
    image = Image.new("RGBA", (4, 2), (10, 20, 30, 255))
    image.putpixel((1, 0), (200, 100, 50, 0))
    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.putpixel((1, 0), 1)
    keyed = Image.open(io.BytesIO(encoded(Image.new("RGB", (2, 2), "red"), "PNG", transparency=(255, 0, 0))))
    for one, colour, place in (
        (image, (200, 100, 50), (1, 0)),
        (Image.open(io.BytesIO(encoded(palette, "PNG", transparency=1))), (0, 0, 255), (1, 0)),
        (keyed, (255, 0, 0), (1, 1)),
    ):
        found = colours_of(one)
        assert found.rgb.getpixel(place) == colour and found.alpha.getpixel(place) == 0
        assert found.on("#00ff00").getpixel(place) == (0, 255, 0)
    assert colours_of(Image.new("RGBA", (2, 2), "red")).alpha is None


def test_animations_are_named(tmp_path):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    for name in ("a.gif", "a.webp", "a.tif", "a.png"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
        with pytest.warns(UserWarning, match=f"{name} has 2 frames or pages; the first is taken"):
            image = open_image(tmp_path / name, still=True)
        assert np.abs(np.asarray(as_rgb(image)).astype(int) - (255, 0, 0)).max() <= 5
