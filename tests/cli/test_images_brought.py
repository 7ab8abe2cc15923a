"""What people bring as images and masks, on the command line: the right result, or a line that says what to do."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from latentdiff.image import open_image
from tests.cli.conftest import files
from tests.reading.image_kinds import tiff
from tests.tasks.images import an_image, mask

QUICK = ("--steps", 2, "--seed", 1)
HOLE = mask((8, 4, 20, 12), 32, 24)
PAINT = np.asarray(HOLE) == 255


@pytest.fixture
def run(command, sd1, workplace):
    clear = an_image(32, 24)
    clear.putalpha(Image.fromarray(np.where(np.arange(32) < 6, 0, 255).astype(np.uint8)[None].repeat(24, 0)))
    clear.save("clear.png")
    an_image(32, 24).save("photo.png")
    Image.fromarray(PAINT.astype(np.uint8)).save("mask_01.png")
    HOLE.save("mask.png")
    hole = an_image(32, 24)
    hole.putalpha(Image.fromarray(255 - np.asarray(HOLE)))
    hole.save("hole.png")
    (workplace / "nan.tif").write_bytes(tiff(np.full((24, 32), np.nan, np.float32)))
    return lambda name, *arguments: command(name, *arguments, *QUICK, "--model", sd1)


def test_masks_in_every_dress_paint_the_same(run):
    for name, options in {"mask.png": (), "mask_01.png": (), "hole.png": (), "inverted.png": ("--invert-mask",)}.items():
        Image.fromarray(255 - np.asarray(HOLE)).save("inverted.png")
        done = run("inpaint", "photo.png", "cat", "--mask", name, *options, "--out", f"by-{name}", "--compare", f"row-{name}")
        assert done.code == 0, done.err
    made = [open_image(f"by-{name}").tobytes() for name in ("mask.png", "mask_01.png", "hole.png", "inverted.png")]
    assert len(set(made)) == 1
    assert len({open_image(f"row-{name}").tobytes() for name in ("mask.png", "mask_01.png", "hole.png")}) == 1
    changed = (np.asarray(open_image("by-mask.png")) != np.asarray(an_image(32, 24))).any(axis=-1)
    assert changed[PAINT].mean() > 0.9 and not changed[~PAINT].any()


def test_no_transparent_pixel_changes(run):
    assert run("inpaint", "clear.png", "cat", "--mask", "mask.png", "--out", "a.webp", "--quality", 100).code == 0
    kept = np.asarray(open_image("a.webp")) == np.asarray(open_image("clear.png"))
    assert kept[~PAINT].all() and not kept[PAINT].all()
    assert run("edit", "clear.png", "cat", "--out", "b.png").code == 0
    assert open_image("b.png").getchannel("A").tobytes() == open_image("clear.png").getchannel("A").tobytes()


@pytest.mark.parametrize(
    ("arguments", "code", "reason"),
    [
        (("inpaint", "photo.png", "cat", "--mask", "photo.png"), 2, "the mask photo.png has colours"),
        (("inpaint", "photo.png", "cat", "--mask", "mask.png", "--mask", "clear.png"), 0, ""),
        (("edit", "clear.png", "cat", "--out", "a.jpg"), 2, "clear.png has transparent parts, which JPEG does not hold"),
        (("edit", "clear.png", "cat", "--format", "jpg"), 2, "which JPEG does not hold"),
        (("inpaint", "clear.png", "cat", "--mask", "mask.png", "--out", "a.jpg"), 2, "which JPEG does not hold"),
        (("inpaint", "hole.png", "cat", "--mask", "hole.png", "--out", "a.jpg"), 0, ""),
        (("edit", "nan.tif", "cat"), 1, "nan.tif holds floating-point numbers that are not finite"),
        (("restore", "photo.png", "--operator", "inpaint", "--mask", "photo.png"), 2, "photo.png has colours"),
        (("restore", "photo.png", "--operator", "denoise", "--sigma", 0.1, "--invert-mask"), 2, "--invert-mask belongs to"),
    ],
)
def test_right_or_a_line(run, workplace, arguments, code, reason):
    before = files(workplace)
    done = run(*arguments)
    assert done.code == code, done.err
    if code:
        assert len(done.errors) == 1 and reason in done.errors[0] and files(workplace) == before
