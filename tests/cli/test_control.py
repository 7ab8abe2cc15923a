from __future__ import annotations

import pytest
from PIL import Image

from latentdiff.cli.image_prompts import with_numbers
from latentdiff.image import open_image
from latentdiff.recipe import read_recipe
from tests.adapters.control.nets import hint, saved
from tests.tasks.images import an_image, apart, mask


@pytest.fixture
def net(workplace) -> str:
    hint().save("hint.png")
    return saved(workplace).name


def test_generate_and_reproduce(command, sd1, net):
    options = ["--model", sd1, "--steps", 3, "--seed", 1]
    done = command(
        "generate", "cat", *options, "--control", "hint.png", "--control-model", f"{net}:0.8@0.0-0.7", "--out", "a.png"
    )
    assert done.code == 0, done.err
    (recorded,) = read_recipe(open_image("a.png").info).controls
    assert (recorded.scale, recorded.end, recorded.image["file"], recorded.model["file"]) == (0.8, 0.7, "hint.png", net)
    done = command("reproduce", "a.png", "--model", sd1)
    assert done.out == "identical: every pixel is the same\n", done.err
    done = command("generate", "cat", *options, "--out", "plain.png")
    assert apart(open_image("a.png"), open_image("plain.png")) > 2
    hint(9).save("hint.png")
    done = command("reproduce", "a.png", "--model", sd1)
    assert done.code == 1 and "control_image1" in done.errors[0] and "SHA-256 differs" in done.errors[0]


def test_two_prepared_first_and_in_other_tasks(command, sd1, net):
    an_image().save("photo.png")
    mask((8, 8, 40, 40)).save("mask.png")
    two = [
        "--control",
        "tile=photo.png",
        "--control-model",
        net,
        "--control",
        "hint.png",
        "--control-model",
        f"{net}:0.5",
    ]
    same = ["--model", sd1, "--steps", 3, "--seed", 1, *two]
    for name, arguments in {
        "edited": ["edit", "photo.png", "cat", "--strength", 0.7],
        "painted": ["inpaint", "photo.png", "cat", "--mask", "mask.png"],
        "guessed": ["generate", "", "--control-guess"],
    }.items():
        done = command(*arguments, *same, "--out", f"{name}.png")
        assert done.code == 0, done.err
        assert [one.prepare for one in read_recipe(open_image(f"{name}.png").info).controls] == ["tile", None]
        assert command("reproduce", f"{name}.png", "--model", sd1).code == 0


def test_grids_and_ways_follow_them(command, sd1, net):
    same = ["--model", sd1, "--steps", 2, "--seed", 1]
    control = ["--control", "hint.png", "--control-model", f"{net}:0.8"]
    assert command("generate", "cat", *same, *control, "--out", "one.png").code == 0
    done = command("grid", "cat", "--x", "steps=2,3", *same, *control, "--out", "grid.png")
    assert done.code == 0, done.err
    one, sheet = open_image("one.png"), open_image("grid.png")
    cells = [sheet.crop((x, y, x + 64, y + 64)) for x in range(sheet.width - 63) for y in range(sheet.height - 63)]
    assert min(apart(cell, one) for cell in cells) <= 1
    done = command("interpolate", "cat", "dog", "--frames", 2, *same, *control, "--out", "way")
    assert done.code == 0, done.err
    assert apart(open_image("way/frame-000.png"), one) <= 1
    assert [each.scale for each in read_recipe(open_image("way/frame-001.png").info).controls] == [0.8]
    assert command("reproduce", "way/frame-001.png", "--model", sd1, "--source", "control_image1=hint.png", "--source",
                   f"control_model1={net}").code == 0  # fmt: skip


def test_existing_images_are_known_by_their_controls(command, sd1, net):
    same = ["generate", "cat", "--model", sd1, "--steps", 2, "--seed", 1]
    control = ["--control", "hint.png", "--control-model", net]
    assert command(*same).code == 0
    assert "cat-1-2.png" in command(*same, *control, "--skip-existing").out.replace("_", "-")
    assert "is there already" in command(*same, *control, "--skip-existing").err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--control", "hint.png"], "a --control-model for each --control, found 0 for 1"),
        (["--control-guess"], "--control and --control-model with --control-guess"),
        (["--control", "magic=hint.png", "--control-model", "NET"], "KIND of canny, scribble"),
        (["--control", "hint.png", "--control-model", "NET", "--width", 128], "in the proportions of what is made"),
        (["--control", "hint.png", "--control-model", "NET", "--cache-interval", 2], "leave --cache-interval at 1"),
        (["--control", "hint.png", "--control-model", "SD1"], "expected"),
        (["--control", "none.png", "--control-model", "NET"], "no image at none.png"),
    ],
)
def test_bad_input_is_one_line(command, sd1, net, arguments, message):
    places = {"NET": net, "SD1": sd1}
    done = command("generate", "cat", "--model", sd1, "--steps", 2, "--seed", 1, *(places.get(a, a) for a in arguments))
    assert done.code != 0 and len(done.errors) == 1 and message in done.errors[0], done.err


def test_models_with_numbers(workplace):
    assert with_numbers("a.safetensors") == ("a.safetensors", {})
    assert with_numbers("a.b:0.8") == ("a.b", {"scale": 0.8})
    assert with_numbers("x/a:1@0.1-.6") == ("x/a", {"scale": 1.0, "start": 0.1, "end": 0.6})
    assert with_numbers("a@0-0.5") == ("a", {"start": 0.0, "end": 0.5})
    assert with_numbers("C:/x/a.safetensors") == ("C:/x/a.safetensors", {})
    (workplace / "odd:0.5").touch()
    assert with_numbers("odd:0.5") == ("odd:0.5", {})


def test_prepare(command, workplace):
    an_image().save("photo.png")
    done = command("control", "prepare", "tile", "photo.png", "--out", "tile.png")
    assert (done.code, done.out) == (0, "tile.png\n") and Image.open("tile.png").size == (64, 64)
    assert command("control", "prepare", "tile", "photo.png", "--low", 3, "--out", "b.png").errors == [
        "error: tile takes no --low; leave it out"
    ]
    assert command("control", "prepare", "canny", "none.png", "--out", "c.png").code != 0
    assert not (workplace / "c.png").exists()
