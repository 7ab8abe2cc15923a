"""The commands edit, inpaint and interpolate, and `reproduce` on what they made."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from latentdiff.image import frames_of, gif_of, open_image, save_png
from latentdiff.recipe import read_recipe
from tests import peers
from tests.cli.conftest import files
from tests.tasks.images import an_image, apart, mask, pixels

QUICK = ("--steps", 3, "--seed", 5)


@pytest.fixture
def sources(workplace):
    save_png(an_image(24, 20), "photo.png")
    save_png(mask((4, 4, 12, 12), 24, 20), "mask.png")


def test_edit_and_reproduce(command, sd1, sources, workplace):
    done = command("edit", "photo.png", "red fox", "--strength", 0.7, "--model", sd1, *QUICK, "--compare", "row.png")
    assert (done.code, done.out) == (0, "images/red-fox-5.png\nrow.png\n")
    made = open_image("images/red-fox-5.png")
    assert made.size == (24, 20) and read_recipe(made.info).task == "edit"
    done = command("reproduce", "images/red-fox-5.png", "--model", sd1, "--source", "image=photo.png")
    assert (done.code, done.out) == (0, "identical: every pixel is the same\n")
    assert files(workplace) == ["images/red-fox-5.png", "mask.png", "photo.png", "row.png"]


def test_instructions_and_reproduce(command, sources, workplace):
    model = peers.folder("pix2pix")
    done = command(
        "edit", "photo.png", "red fox", "--image-guidance-scale", 2, "--model", model, *QUICK, "--out", "a.png"
    )  # fmt: skip
    assert (done.code, done.out) == (0, "a.png\n")
    made = open_image("a.png")
    assert read_recipe(made.info).task_settings["image_guidance_scale"] == 2.0
    assert "Image CFG scale: 2.0" in made.info["parameters"]
    done = command("reproduce", "a.png", "--model", model)
    assert (done.code, done.out) == (0, "identical: every pixel is the same\n")
    done = command("generate", "red fox", "--model", model, *QUICK)
    assert done.code == 2 and "this model follows instructions about an image" in done.errors[-1]


def test_depth_and_reproduce(command, sources, workplace):
    model = peers.folder("depth")
    save_png(mask((4, 4, 12, 12), 24, 20), "map.png")
    done = command("edit", "photo.png", "red fox", "--depth", "map.png", "--model", model, *QUICK, "--out", "a.png")
    assert (done.code, done.out) == (0, "a.png\n")
    done = command("reproduce", "a.png", "--model", model)
    assert (done.code, done.out) == (0, "identical: every pixel is the same\n")
    estimator = model / "depth_estimator"
    done = command("edit", "photo.png", "red fox", "--depth", estimator, "--model", model, *QUICK, "--out", "b.png")
    assert (done.code, done.out) == (0, "b.png\n")
    done = command("reproduce", "b.png", "--model", model, "--source", f"depth_model={estimator}")
    assert (done.code, done.out) == (0, "identical: every pixel is the same\n")
    done = command("edit", "photo.png", "red fox", "--depth", "none.png", "--model", model, *QUICK)
    assert done.code == 1 and done.errors == ["error: no image at none.png"]


def test_the_row_shows_what_went_in_and_came_out(command, sd1, sources):
    command(
        "inpaint",
        "photo.png",
        "cat",
        "--mask",
        "mask.png",
        "--model",
        sd1,
        *QUICK,
        "--out",
        "a.png",
        "--compare",
        "row.png",
    )
    row = pixels(open_image("row.png"))
    for number, name in enumerate(["photo.png", "mask.png", "a.png"]):
        left = 6 + number * 36
        assert np.array_equal(row[6:26, left : left + 24], pixels(open_image(name).convert("RGB")))


@pytest.mark.parametrize("family", ["sd1", "inpaint"])
def test_inpaint_and_reproduce_beside_the_sources(command, sources, family):
    options = ("--grow", 1, "--blur", 1, "--only-masked", "--padding", 2, "--model", peers.folder(family))
    assert command("inpaint", "photo.png", "cat", "--mask", "mask.png", *QUICK, *options, "--out", "a.png").code == 0
    kept = pixels(open_image("a.png"))[:, 18:]
    assert np.array_equal(kept, pixels(open_image("photo.png"))[:, 18:])
    done = command("reproduce", "a.png", "--model", peers.folder(family))
    assert (done.code, done.out) == (0, "identical: every pixel is the same\n")


def test_outpainting_needs_no_mask(command, sd1, sources):
    assert (
        command("inpaint", "photo.png", "cat", "--extend", 8, 0, 0, 4, *QUICK, "--model", sd1, "--out", "a.png").code
        == 0
    )
    made = open_image("a.png")
    assert made.size == (32, 24) and apart(made.crop((8, 0, 32, 20)), open_image("photo.png")) == 0
    assert command("reproduce", "a.png", "--model", sd1).code == 0


def test_several_images_and_free_names(command, sd1, sources, workplace):
    for _ in range(2):
        assert command("edit", "photo.png", "cat", "-n", 2, *QUICK, "--model", sd1, "--no-metadata").code == 0
    names = ["cat-5-2.png", "cat-5.png", "cat-6-2.png", "cat-6.png"]
    assert files(workplace / "images") == names
    assert not open_image("images/cat-5.png").info


def test_a_changed_or_missing_source(command, sd1, sources):
    command("edit", "photo.png", "cat", *QUICK, "--model", sd1, "--out", "a.png")
    save_png(an_image(24, 20, seed=1), "photo.png")
    done = command("reproduce", "a.png", "--model", sd1)
    assert done.code == 1 and "photo.png is not the image that the recipe names" in done.errors[0]
    done = command("reproduce", "a.png", "--model", sd1, "--source", "image=none.png")
    assert done.code == 1 and "not at none.png; say where it is with --source image=FILE" in done.errors[0]
    done = command("reproduce", "a.png", "--model", sd1, "--source", "photo.png")
    assert done.code == 2 and "a role of the recipe (image)" in done.errors[0]


@pytest.mark.parametrize(
    ("changes", "code", "message"),
    [
        ({"task": "dream"}, 1, "made by the task 'dream'"),
        ({"task_settings": {"strength": "x"}}, 1, "not valid at task_settings.strength"),
        ({"task_settings": {}}, 1, "not valid at task_settings.strength"),
        ({"task_settings": {"strength": 7.0}}, 2, "strength to be a finite number of 0 to 1"),
        ({"sources": {}}, 1, "no source 'image'"),
        ({"sources": {"image": {}}}, 1, "without a name"),
        ({"sources": {"image": {"file": "../../../etc/passwd", "sha256": ""}}}, 1, "which is not at passwd"),
    ],
)
def test_hostile_recipes(command, sd1, sources, changes, code, message):
    command("edit", "photo.png", "cat", *QUICK, "--model", sd1, "--out", "a.png")
    image = open_image("a.png")
    image.info["latentdiff"] = json.dumps(json.loads(image.info["latentdiff"]) | changes)
    save_png(image, "a.png")
    done = command("reproduce", "a.png", "--model", sd1)
    assert done.code == code and len(done.errors) == 1 and message in done.errors[0]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("edit", "none.png", "cat"), 1, "no image at none.png"),
        (("edit", "photo.png", "cat", "--out", "photo.png"), 2, "photo.png is there already"),
        (("edit", "photo.png", "cat", "-n", 2, "--out", "a.png"), 2, "expected a folder for 2 images"),
        (("edit", "photo.png", "cat", "--compare", "row"), 2, "expected --compare FILE with an ending"),
        (
            ("edit", "photo.png", "cat", "--out", "a.png", "--compare", "./a.png"),
            2,
            "--out and --compare both name a.png",
        ),
        (("edit", "photo.png", "cat", "--strength", 3), 2, "strength to be a finite number of 0 to 1"),
        (("inpaint", "photo.png", "cat"), 2, "expected --mask FILE, or --extend"),
        (("inpaint", "photo.png", "cat", "--mask", "none.png"), 1, "no image at none.png"),
        (("inpaint", "photo.png", "cat", "--mask", "small.png"), 2, "24 x 20 pixels, found 2 x 2"),
        (("interpolate", "cat"), 2, "two prompts or more"),
        (("interpolate", "cat", "dog", "--frames", 1), 2, "--frames"),
        (("interpolate", "cat", "dog", "--out", "photo.png"), 2, "photo.png"),
    ],
)
def test_bad_arguments(command, sd1, sources, workplace, arguments, code, message):
    Image.new("L", (2, 2), 255).save("small.png")
    before = files(workplace)
    done = command(*arguments, "--model", sd1, *QUICK)
    assert done.code == code and len(done.errors) == 1 and message in done.errors[0]
    assert files(workplace) == before


def test_drawn_seeds_are_printed(command, sd1, sources):
    done = command("edit", "photo.png", "cat", "--steps", 2, "--model", sd1, "--out", "a.png")
    assert f"seed: {read_recipe(open_image('a.png').info).seed}" in done.err


def test_frames_and_reproduce(command, sd1, workplace):
    done = command("interpolate", "cat", "red fox", "--frames", 3, "--model", sd1, *QUICK)
    assert (done.code, done.out) == (0, "frames\n")
    assert files(workplace) == ["frames/frame-000.png", "frames/frame-001.png", "frames/frame-002.png"]
    assert command("reproduce", "frames/frame-001.png", "--model", sd1).code == 0
    done = command("interpolate", "cat", "red fox", "--model", sd1, *QUICK)
    assert done.code == 2 and "frames is there already" in done.errors[0]


def test_gif_and_reproduce(command, sd1, workplace):
    options = ("--frames", 3, "--fps", 10, "--model", sd1, *QUICK)
    assert command("interpolate", "cat", "red fox", *options, "--out", "a.gif").code == 0
    assert command("interpolate", "cat", "red fox", *options).code == 0
    assert files(workplace)[0] == "a.gif"
    with Image.open("a.gif") as animation:
        assert (animation.n_frames, animation.info["duration"], animation.info["loop"]) == (3, 100, 0)
        recipe = read_recipe(animation.info)
    assert (recipe.task, recipe.task_settings["frame"], recipe.task_settings["fps"]) == ("interpolate", None, 10.0)
    for number, frame in enumerate(frames_of("a.gif")):  # but for the choice of 256 colours, the frames
        away = pixels(frame) - pixels(open_image(f"frames/frame-{number:03}.png"))
        assert np.abs(away).mean() < 16
    done = command("reproduce", "a.gif", "--model", sd1, "--out", "b.gif")
    assert (done.code, done.out) == (0, "b.gif\nidentical: every pixel is the same\n")
    assert Path("b.gif").read_bytes() == Path("a.gif").read_bytes()
    assert "recipe present (comment)" in command("inspect", "a.gif").out
    assert command("interpolate", "cat", "dog", "--out", "a.gif", "--model", sd1, *QUICK).code == 2


def test_gifs_that_are_not_what_their_recipe_makes(command, sd1, workplace):
    options = ("--frames", 3, "--model", sd1, *QUICK)
    assert command("interpolate", "cat", "red fox", *options, "--out", "a.gif").code == 0
    comment = Image.open("a.gif").info["comment"].decode()
    frames = frames_of("a.gif")
    for wrong, code, message in (
        ([frames[0], frames[2]], 1, "the animation has been edited: it has 2 frames, made again 3"),
        ([frame.resize((8, 8)) for frame in frames], 1, "has been resized"),
    ):
        Path("b.gif").write_bytes(gif_of(wrong, 12.0, comment))
        done = command("reproduce", "b.gif", "--model", sd1)
        assert done.code == code and message in done.errors[0]
    Path("b.gif").write_bytes(gif_of([frames[0], frames[1].rotate(180), frames[2]], 12.0, comment))
    done = command("reproduce", "b.gif", "--model", sd1)
    assert done.code == 1 and done.out.startswith("difference: at most")
    Path("b.gif").write_bytes(gif_of(frames, 12.0, comment.replace('"fps": 12.0', '"fps": 0.0')))
    done = command("reproduce", "b.gif", "--model", sd1)
    assert done.code == 2 and "0.1 to 50 frames per second, found 0" in done.errors[0]
    Path("b.gif").write_bytes(Path("a.gif").read_bytes()[:-400])
    done = command("reproduce", "b.gif", "--model", sd1)
    assert done.code == 1 and len(done.errors) == 1
    assert command("interpolate", "cat", "red fox", *options, "--out", "c.gif", "--no-metadata").code == 0
    done = command("reproduce", "c.gif", "--model", sd1)
    assert done.code == 1 and "carries no recipe" in done.errors[0]


def test_removing_needs_no_prompt(command, sd1, sources):
    options = ("--mask", "mask.png", *QUICK, "--model", sd1, "--out", "a.png")
    assert command("inpaint", "photo.png", *options).code == 2
    assert command("inpaint", "photo.png", "--remove", *options).code == 0
    assert command("reproduce", "a.png", "--model", sd1).code == 0
