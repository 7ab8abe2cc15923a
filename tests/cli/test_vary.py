"""The command vary, and `reproduce` on what it made."""

from __future__ import annotations

from latentdiff.image import open_image, save_png
from tests import peers
from tests.tasks.images import an_image

QUICK = ("--steps", 2, "--seed", 5)


def test_vary_and_reproduce(command, workplace):
    save_png(an_image(24, 20), "photo.png")
    model = peers.folder("unclip")
    options = ("--model", model, "--noise-level", 30, "--width", 48, *QUICK)
    done = command("vary", "photo.png", "red fox", *options, "-n", 2, "--compare", "row.png")
    assert done.code == 0, done.err
    assert done.out == "images/red-fox-5.png\nimages/red-fox-6.png\nrow.png\n"
    assert open_image("images/red-fox-6.png").size == (48, 64)
    done = command("reproduce", "images/red-fox-6.png", "--model", model, "--source", "image=photo.png")
    assert (done.code, done.out.splitlines()[0].partition(":")[0]) in [(0, "identical"), (0, "difference")]
    done = command("vary", "photo.png", "--model", peers.folder("sd1"), *QUICK)
    assert done.code == 2 and "expected an unCLIP model" in done.errors[-1]
