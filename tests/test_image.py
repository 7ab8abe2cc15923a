from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import piexif
import piexif.helper
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from latentdiff.errors import DataError, LatentDiffError, UsageError
from latentdiff.image import (
    as_rgb,
    contact_sheet,
    open_image,
    save_image,
    save_png,
    side_by_side,
    to_pil,
    to_tensor,
)
from latentdiff.reading.texts import texts_of


def test_same_rounding_as_diffusers():
    images = torch.linspace(-1.3, 1.3, 2 * 3 * 40 * 30).view(2, 3, 40, 30)
    expected = VaeImageProcessor().postprocess(images, output_type="pil")
    for ours, theirs in zip(to_pil(images), expected, strict=True):
        assert ours.size == (30, 40)
        assert np.array_equal(np.asarray(ours), np.asarray(theirs))


def test_there_and_back_is_exact():
    levels = torch.arange(256).view(1, 1, 16, 16).expand(2, 3, 16, 16).float() / 127.5 - 1
    assert torch.equal(to_tensor(to_pil(levels)), levels)


def test_grey_and_transparent_images_become_rgb():
    assert to_tensor([Image.new("L", (5, 4), 255), Image.new("RGBA", (5, 4), (255, 255, 255, 0))]).unique() == 1


@pytest.mark.parametrize("text", ["plain", "naïve café", "狐 🦊\nin two lines", "a\tb  ", "x" * 100_000])
def test_png_keeps_text(tmp_path, text):
    image = Image.new("RGB", (4, 4), "red")
    image.info |= {"parameters": text, "latentdiff": "{}", "dpi": (72, 72)}
    save_png(image, tmp_path / "a.png")
    again = open_image(tmp_path / "a.png")
    assert again.info["parameters"] == text and again.info["latentdiff"] == "{}"
    assert np.array_equal(np.asarray(again), np.asarray(image))
    assert image.info["parameters"] == text  # saving changes nothing


def test_png_without_metadata(tmp_path):
    image = Image.new("RGB", (4, 4))
    image.info["parameters"] = "secret"
    save_png(image, tmp_path / "a.png", metadata=False)
    assert open_image(tmp_path / "a.png").info == {}
    assert b"secret" not in (tmp_path / "a.png").read_bytes()


def test_failed_save_leaves_nothing_and_keeps_the_old(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    path.write_bytes(b"old")

    def fail(self, file, **options):
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(LatentDiffError, match="No space left"):
        save_png(Image.new("RGB", (4, 4)), path)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_with(extra: bytes) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + extra + chunk(b"IDAT", zlib.compress(b"\0\0\0\0")) + chunk(b"IEND", b"")


def noise_png() -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(file, format="PNG")
    return file.getvalue()


NOISE = noise_png()
BOMB = chunk(b"zTXt", b"parameters\0\0" + zlib.compress(b"a" * 70_000_000))


@pytest.mark.parametrize(
    "content",
    [
        b"", b"<html>", b"\x89PNG\r\n\x1a\n", NOISE[: len(NOISE) // 2], png_with(BOMB),
        png_with(chunk(b"IHDR", struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0))),
    ],
    ids=["empty", "html", "signature", "truncated", "text bomb", "pixel bomb"],
)  # fmt: skip
def test_hostile_files_are_data_errors(tmp_path, content):
    path = tmp_path / "a.png"
    path.write_bytes(content)
    with pytest.raises(DataError, match="cannot read .*a.png as an image"):
        open_image(path)


def test_no_file(tmp_path):
    with pytest.raises(DataError, match="no image at"):
        open_image(tmp_path / "none.png")
    with pytest.raises(DataError, match="cannot read"):
        open_image(tmp_path)


def test_contact_sheet_shows_every_image():
    colours = [(10 * i, 0, 255 - 10 * i) for i in range(6)]
    images = [Image.new("RGB", (40, 40), colour) for colour in colours]
    sheet = contact_sheet(
        images, ["caption"] * 5 + ["a very long caption, far too long to be shown in whole " * 3], columns=4
    )
    shown = {colour for _, colour in sheet.getcolors(maxcolors=10_000)}
    assert set(colours) <= shown
    assert sheet.width == 4 * (40 + 12) and sheet.height == 2 * (40 + 60)
    assert contact_sheet(images[:1], ["x"]).width == 52


def test_any_mode_becomes_upright_8_bit_rgb():
    half = np.full((4, 6), 32896, np.uint16)  # 128 * 257
    turned = Image.new("RGB", (4, 6), "red")
    turned.getexif()[0x0112] = 6  # quarter turn
    for image, colour in [
        (Image.fromarray(half), (128, 128, 128)),
        (Image.fromarray(half.astype(np.int32)), (128, 128, 128)),
        (Image.new("F", (6, 4), 128.0), (128, 128, 128)),
        (Image.new("1", (6, 4), 1), (255, 255, 255)),
        (Image.new("CMYK", (6, 4), (0, 0, 0, 0)), (255, 255, 255)),
        (Image.new("RGBA", (6, 4), (0, 0, 0, 0)), (255, 255, 255)),
        (Image.new("LA", (6, 4), (0, 255)), (0, 0, 0)),
        (turned, (255, 0, 0)),
    ]:
        rgb = as_rgb(image)
        assert (rgb.mode, rgb.size) == ("RGB", (6, 4))
        assert np.abs(np.asarray(rgb).astype(int) - colour).max() <= 1


def test_a_palette_with_a_transparent_colour():
    image = Image.new("P", (2, 1), 0)
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((1, 0), 1)
    image.info["transparency"] = 1
    assert list(as_rgb(image).get_flattened_data()) == [(255, 0, 0), (255, 255, 255)]


def test_images_of_other_sizes_stand_side_by_side():
    row = side_by_side({"small": Image.new("L", (10, 5), 200), "large": Image.new("RGB", (20, 30), "red")})
    assert row.width == 2 * (20 + 12)
    assert row.getpixel((6, 6)) == (200, 200, 200) and row.getpixel((20, 20)) == (255, 255, 255)
    assert row.getpixel((6 + 32, 6)) == row.getpixel((57, 35)) == (255, 0, 0)


RECIPE = {"parameters": "naïve café, 狐 🦊\nSteps: 20, Sampler: Euler a", "latentdiff": '{"prompt": "caf\\u00e9"}'}


def smooth(size: tuple[int, int] = (64, 48)) -> Image.Image:
    ramp = np.linspace(0, 255, size[0] * size[1]).reshape(size[1], size[0])
    return Image.fromarray(np.stack([ramp, ramp[::-1], ramp[:, ::-1]], axis=-1).round().astype(np.uint8))


@pytest.mark.parametrize("name", ["a.jpg", "B.JPEG", "c.webp", "d.avif", "E.Png"])
def test_every_format_holds_pixels_and_recipe(tmp_path, name):
    image = smooth()
    image.info = dict(RECIPE)
    save_image(image, tmp_path / name)
    again = open_image(tmp_path / name)
    assert again.format == {"j": "JPEG", "w": "WEBP", "a": "AVIF", "p": "PNG"}[name[2].lower()]
    assert {key: again.info[key] for key in RECIPE} == RECIPE == image.info
    difference = np.abs(np.asarray(again.convert("RGB")).astype(int) - np.asarray(image))
    assert difference.mean() < 1.5 and (again.format != "PNG" or difference.max() == 0)
    save_image(image, tmp_path / name, metadata=False)
    content = (tmp_path / name).read_bytes()
    assert texts_of(open_image(tmp_path / name)) == {} and b"latentdiff" not in content
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("name", ["a.jpg", "a.webp"])
def test_the_web_uis_find_the_parameters_in_exif(tmp_path, name):
    """By piexif, with which they write and read it."""
    image = smooth()
    image.info = dict(RECIPE)
    save_image(image, tmp_path / name)
    exif = piexif.load(Image.open(tmp_path / name).info["exif"])
    assert piexif.helper.UserComment.load(exif["Exif"][piexif.ExifIFD.UserComment]) == RECIPE["parameters"]
    theirs = piexif.helper.UserComment.dump(RECIPE["parameters"], encoding="unicode")
    smooth().save(tmp_path / name, exif=piexif.dump({"Exif": {piexif.ExifIFD.UserComment: theirs}}))
    assert texts_of(open_image(tmp_path / name)) == {"parameters": RECIPE["parameters"]}


def in_tags(tags: dict[int, str]) -> Image.Image:
    exif, file = Image.Exif(), io.BytesIO()
    for tag, text in tags.items():
        exif[tag] = text
    smooth().save(file, "WEBP", exif=exif)
    return Image.open(file)


def in_exif(comment: bytes, note: bytes = b"") -> Image.Image:
    file = io.BytesIO()
    own = {piexif.ExifIFD.UserComment: comment} | ({piexif.ExifIFD.MakerNote: note} if note else {})
    smooth().save(file, "JPEG", exif=piexif.dump({"Exif": own}))
    return Image.open(file)


def test_texts_of_other_programs():
    assert texts_of(in_tags({0x0110: 'prompt:{"3": {}}', 0x010F: 'workflow:{"nodes": []}'})) == {
        "prompt": '{"3": {}}',
        "workflow": '{"nodes": []}',
    }
    for code in (b"UNICODE\0" + "Steps: 20".encode("utf-16-le"), b"ASCII\0\0\0Steps: 20", bytes(8) + b"Steps: 20\0"):
        assert texts_of(in_exif(code)) == {"parameters": "Steps: 20"}
    assert texts_of(in_exif(b"Steps: 20", b"a1111")) == {"parameters": "Steps: 20", "fooocus_scheme": "a1111"}
    assert texts_of(in_exif(b"", b"Nikon\0\2\x10")) == {}
    file = io.BytesIO()
    smooth().save(file, "JPEG", comment="café", exif=b"Exif\0\0nonsense")
    assert texts_of(Image.open(file)) == {"comment": "café"}


def test_quality(tmp_path):
    for name in ("a.jpg", "a.avif"):
        sizes = []
        for quality in (30, 95):
            save_image(smooth(), tmp_path / name, quality=quality)
            sizes.append((tmp_path / name).stat().st_size)
        assert sizes[0] < sizes[1]
    half = smooth().copy()
    half.putalpha(Image.fromarray(np.arange(64 * 48).reshape(48, 64).astype(np.uint8)))
    save_image(half, tmp_path / "a.webp", quality=100)
    assert np.array_equal(np.asarray(open_image(tmp_path / "a.webp")), np.asarray(half))  # colours without ink too


def test_what_a_format_cannot_hold(tmp_path):
    clear = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    save_image(Image.new("RGBA", (4, 4), (9, 9, 9, 255)), tmp_path / "opaque.jpg")
    long = Image.new("RGB", (4, 4))
    long.info = {"parameters": "x" * 40_000}
    for image, name, reason in [
        (clear, "a.jpg", "transparent parts"),
        (long, "a.jpg", "longer than a JPEG holds"),
        (Image.new("RGB", (16_384, 1)), "a.webp", "16383 pixels a side"),
        (long, "a.tiff", r"\.png, \.jpg, \.jpeg, \.webp, \.avif, found \.tiff"),
        (long, "a.GIF", "found .GIF"),
        (long, "a", "expected an ending"),
    ]:
        with pytest.raises(UsageError, match=reason):
            save_image(image, tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["opaque.jpg"]
    save_image(long, tmp_path / "long.webp")
    assert open_image(tmp_path / "long.webp").info["parameters"] == long.info["parameters"]


def test_formats_that_this_pillow_lacks(monkeypatch, tmp_path):
    monkeypatch.setattr("PIL.features.check", lambda name: False)
    with pytest.raises(UsageError, match="does not know AVIF; update it"):
        save_image(smooth(), tmp_path / "a.avif")


def test_a_palette_keeps_its_transparency(tmp_path):
    image = Image.new("P", (2, 1), 0)
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((1, 0), 1)
    image.info["transparency"] = 1
    for name in ("a.png", "a.webp"):
        save_image(image, tmp_path / name, quality=100)
        assert open_image(tmp_path / name).convert("RGBA").getchannel("A").tobytes() == b"\xff\0"


def test_save_png_writes_images_as_png(tmp_path):
    with pytest.raises(UsageError, match="expected an image of PIL, found str"):
        save_png("x", tmp_path / "y.png")
    with pytest.raises(UsageError, match="y.jpg as PNG: end the name in .png, or take save_image"):
        save_png(Image.new("RGB", (2, 2)), tmp_path / "y.jpg")
    assert not list(tmp_path.iterdir())
