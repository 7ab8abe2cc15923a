from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from latentdiff.errors import DataError, LatentDiffError
from latentdiff.image import as_rgb, contact_sheet, open_image, save_png, side_by_side, to_pil, to_tensor


def test_same_rounding_as_diffusers():
    images = torch.linspace(-1.3, 1.3, 2 * 3 * 40 * 30).view(2, 3, 40, 30)
    expected = VaeImageProcessor().postprocess(images, output_type="pil")
    for ours, theirs in zip(to_pil(images), expected, strict=True):
        assert ours.size == (30, 40)
        assert np.array_equal(np.asarray(ours), np.asarray(theirs))


def test_there_and_back_is_exact():
    levels = torch.arange(256).view(1, 1, 16, 16).expand(2, 3, 16, 16).float() / 127.5 - 1
    assert torch.equal(to_tensor(to_pil(levels)), levels)


def test_grey_and_transparent_pictures_become_rgb():
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
    with pytest.raises(DataError, match="cannot read .*a.png as a picture"):
        open_image(path)


def test_no_file(tmp_path):
    with pytest.raises(DataError, match="no picture at"):
        open_image(tmp_path / "none.png")
    with pytest.raises(DataError, match="cannot read"):
        open_image(tmp_path)


def test_contact_sheet_shows_every_picture():
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


def test_pictures_of_other_sizes_stand_side_by_side():
    row = side_by_side({"small": Image.new("L", (10, 5), 200), "large": Image.new("RGB", (20, 30), "red")})
    assert row.width == 2 * (20 + 12)
    assert row.getpixel((6, 6)) == (200, 200, 200) and row.getpixel((20, 20)) == (255, 255, 255)
    assert row.getpixel((6 + 32, 6)) == row.getpixel((57, 35)) == (255, 0, 0)
