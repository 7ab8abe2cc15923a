import io

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps

from latentdiff.errors import DataError
from latentdiff.training.data.images import image_size, read_image
from tests.training.data.build import an_image, encoded


def pixels(content: bytes, **options) -> np.ndarray:
    return np.asarray(read_image(content, "x.png", **options))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(an_image(), "PNG", exif=exif)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
    assert np.array_equal(pixels(content), np.asarray(expected))
    assert image_size(content, "x") == expected.size == ((12, 16) if orientation >= 5 else (16, 12))


def test_broken_exif_leaves_the_image_as_it_is():
    content = encoded(an_image(), "PNG", exif=b"Exif\0\0nonsense")
    assert np.array_equal(pixels(content), np.asarray(an_image()))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_on_the_background(mode):
    image = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    image.paste((0, 0, 255, 255), (0, 0, 2, 4))
    content = encoded(image.convert(mode))
    seen = pixels(content, background="#00ff00")
    assert (seen[:, 2:] == (0, 255, 0)).all() and not (seen[:, :2] == (0, 255, 0)).all(axis=-1).any()
    assert (pixels(content)[:, 2:] == 255).all()


def test_half_transparent():
    seen = pixels(encoded(Image.new("RGBA", (2, 2), (0, 0, 0, 128))))
    assert np.abs(seen.astype(int) - 127).max() <= 1


def test_palette():
    image = an_image().quantize(8)
    assert np.array_equal(pixels(encoded(image)), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bits_are_scaled_not_clipped(kind):
    ramp = np.linspace(0, 65535, 256, dtype=np.uint16).reshape(16, 16)
    seen = pixels(encoded(Image.fromarray(ramp), kind))
    assert np.array_equal(seen[..., 0], np.arange(256).reshape(16, 16))


def test_cmyk_without_a_profile():
    image = Image.new("CMYK", (4, 4), (0, 255, 255, 0))
    seen = pixels(encoded(image, "TIFF"))
    assert (seen == (255, 0, 0)).all()


def test_profiles_are_converted():
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB", 5000)).tobytes()
    same = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    plain = np.asarray(an_image())
    for profile in (same, b"broken", lab):  # a LAB profile does not fit an RGB image
        assert np.array_equal(pixels(encoded(an_image(), "PNG", icc_profile=profile)), plain)


def truncated() -> bytes:
    return encoded(an_image(size=(200, 200)), "JPEG")[:2000]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "the file is empty"),
        (b"a cat on a mat\n", "a text file that begins with 'a cat on a mat"),
        (b"<!DOCTYPE html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"\x80\x81\x82\x83", "none of PNG, JPEG"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "text file"),
        (truncated(), "truncated"),
    ],
)
def test_unreadable(content, reason):
    with pytest.raises(DataError, match=reason) as error:
        read_image(content, "a/b.png")
    assert "a/b.png" in str(error.value) and "\n" not in str(error.value)


def test_decompression_bomb(monkeypatch):
    content = encoded(Image.new("1", (300, 300)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40_000)
    for read in (read_image, image_size):
        with pytest.raises(DataError, match="more than 80,000 pixels"):
            read(content, "x")


@pytest.mark.parametrize("size", [(1, 1), (20000, 100)])
def test_extreme_sizes(size):
    content = encoded(Image.new("L", size, 7))
    assert read_image(content, "x").size == image_size(content, "x") == size


def test_missing_file(tmp_path):
    with pytest.raises(DataError, match="no image at x.png"):
        read_image(tmp_path / "x.png", "x.png")
