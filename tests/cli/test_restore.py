"""The command restore, and `reproduce` on what it made."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from latentdiff.image import open_image, save_png
from latentdiff.recipe import read_recipe
from tests.cli.conftest import files
from tests.tasks.images import an_image, mask, pixels

QUICK = ("--steps", 2, "--seed", 5)


@pytest.fixture
def sources(workplace):
    save_png(an_image(24, 16), "photo.png")
    save_png(mask((4, 4, 12, 12), 24, 16), "mask.png")
    np.save("kernel.npy", np.ones((3, 3)))
    save_png(Image.fromarray(np.full((3, 1), 200, np.uint8)), "kernel.png")


@pytest.mark.parametrize(
    ("options", "size"),
    [
        (("inpaint", "--mask", "mask.png"), (24, 16)),
        (("super-resolution", "--factor", 2), (48, 32)),
        (("super-resolution", "--factor", 2, "--kernel", "box"), (48, 32)),
        (("deblur", "--kernel", "gaussian:0.8", "--sigma", 0.02), (24, 16)),
        (("deblur", "--kernel", "motion:3:45", "--border", "periodic"), (24, 16)),
        (("deblur", "--kernel", "kernel.npy"), (24, 16)),
        (("deblur", "--kernel", "kernel.png"), (24, 16)),
        (("denoise", "--sigma", 0.1), (24, 16)),
        (("colourise",), (24, 16)),
    ],
    ids=lambda value: " ".join(map(str, value)),
)
def test_restore_and_reproduce(command, sd1, sources, options, size):
    done = command("restore", "photo.png", "--operator", *options, "--model", sd1, *QUICK, "--out", "a.png")
    assert (done.code, done.out) == (0, "a.png\n") and "misses the measurement by" in done.err
    made = open_image("a.png")
    assert made.size == size and read_recipe(made.info).task == "restore"
    done = command("reproduce", "a.png", "--model", sd1)
    assert (done.code, done.out) == (0, "identical: every pixel is the same\n")


def test_several_images_with_mean_uncertainty_and_comparison(command, sd1, sources, workplace):
    extras = ("-n", 2, "--mean", "mean.png", "--uncertainty", "spread.png", "--compare", "row.png")
    how = ("--method", "dps", "--set", "scale=0.5", "--prompt", "red fox")
    done = command(
        "restore", "photo.png", "--operator", "denoise", "--sigma", 0.2, *how, *extras, "--model", sd1, *QUICK
    )
    names = ["images/red-fox-5.png", "images/red-fox-6.png", "row.png", "mean.png", "spread.png"]
    assert (done.code, done.out.split()) == (0, names)
    assert open_image("spread.png").mode == "L"
    done = command("reproduce", "mean.png", "--model", sd1)
    assert done.code == 0
    assert files(workplace) == sorted([*names, "photo.png", "mask.png", "kernel.npy", "kernel.png"])


def test_filled_pixels_differ_and_the_others_do_not(command, sd1, sources):
    command(
        "restore", "photo.png", "--operator", "inpaint", "--mask", "mask.png", "--model", sd1, *QUICK, "--out", "a.png"
    )
    before, after = pixels(open_image("photo.png")), pixels(open_image("a.png"))
    known = pixels(open_image("mask.png").convert("L")) == 0
    assert np.array_equal(before[known], after[known]) and not np.array_equal(before[~known], after[~known])


@pytest.mark.parametrize(
    "options",
    [
        ("inpaint",),
        ("inpaint", "--mask", "nothing.png"),
        ("inpaint", "--mask", "kernel.png"),
        ("inpaint", "--mask", "mask.png", "--factor", 2),
        ("super-resolution",),
        ("super-resolution", "--factor", 1),
        ("super-resolution", "--factor", 2, "--kernel", "lanczos"),
        ("deblur",),
        ("deblur", "--kernel", "gaussian:wide"),
        ("deblur", "--kernel", "gaussian:1:2"),
        ("deblur", "--kernel", "gaussian:0"),
        ("deblur", "--kernel", "gaussian:30"),
        ("deblur", "--kernel", "nothing.npy"),
        ("deblur", "--kernel", "nothing.png"),
        ("denoise",),
        ("denoise", "--sigma", 0),
        ("denoise", "--sigma", "nan"),
        ("denoise", "--sigma", 0.1, "--set", "zeta"),
        ("denoise", "--sigma", 0.1, "--set", "magic=1"),
        ("denoise", "--sigma", 0.1, "--steps", 0),
        ("denoise", "--sigma", 0.1, "--mean", "mean.png"),
        ("denoise", "--sigma", 0.1, "--mean", "mean", "-n", 2),
    ],
    ids=lambda value: " ".join(map(str, value)),
)
def test_wrong_use_is_one_line(command, sd1, sources, workplace, options):
    before = files(workplace)
    done = command("restore", "photo.png", "--operator", *options, "--model", sd1, "--seed", 1)
    assert done.code in (1, 2) and len(done.errors) == 1 and done.out == ""
    assert files(workplace) == before
