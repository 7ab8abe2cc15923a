"""`latentdiff invert` and `latentdiff translate`, and `reproduce` on what they make."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from latentdiff.image import open_image
from latentdiff.recipe import read_recipe
from tests.cli.conftest import files


@pytest.fixture
def photo(workplace):
    ramp = np.linspace(0, 255, 48 * 64 * 3).reshape(48, 64, 3)
    Image.fromarray(ramp.astype(np.uint8)).save(workplace / "photo.png")
    return "photo.png"


def test_invert_reports_its_error_and_translate_takes_what_it_wrote(command, workplace, sd1, photo):
    done = command("invert", photo, "--prompt", "the cat", "--steps", 4, "--model", sd1)
    assert (done.code, done.errors) == (0, [])
    path, error, noise = done.out.splitlines()
    assert path == "photo.inversion"
    assert error.startswith("reconstruction: ") and error.endswith(" dB") and "the VAE alone keeps" in error
    assert noise.startswith("noise: mean ")

    done = command("translate", path, "red fox", "--model", sd1, "--out", "fox.png", "--compare", "both.png")
    assert (done.code, done.out.split()) == (0, ["fox.png", "both.png"])
    assert open_image(workplace / "fox.png").size == (64, 48)
    assert open_image(workplace / "both.png").width > 128
    done = command("reproduce", "fox.png", "--model", sd1)
    assert done.code == 0, done.err


@pytest.mark.parametrize("method", ["features", "null-text", "negative-prompt", "direct", "edict"])
def test_translate_inverts_an_image_itself_and_reproduce_does_so_again(command, workplace, sd1, photo, method):
    done = command(
        "translate",
        photo,
        "red fox",
        "--method",
        method,
        "--source-prompt",
        "the cat",
        "--steps",
        3,
        "--model",
        sd1,
        "--out",
        "o",
    )
    assert (done.code, done.out.strip()) == (0, "o/red-fox-0.png")
    recipe = read_recipe(open_image(workplace / done.out.strip()).info)
    assert (recipe.task, recipe.steps, recipe.task_settings["method"]) == ("translate", 3, method)
    done = command("reproduce", "o/red-fox-0.png", "--model", sd1, "--source", f"image={photo}")
    assert done.code == 0, done.err


def test_the_options_of_features_and_negatives_arrive(command, workplace, sd1, photo):
    done = command(
        "translate", photo, "red fox", "--negative", "the cat", "--negative-schedule", "linear", "--negative-alpha", 0.75,
        "--tau-features", 0.5, "--tau-attention", 0.25, "--feature-block", "up_blocks.2.resnets.0",
        "--attention-block", "up_blocks.3.attentions.0", "--steps", 4, "--iterations", 0, "--guidance", 3,
        "--width", 48, "--model", sd1, "--out", "fox.png",
    )  # fmt: skip
    assert done.code == 0, done.err
    recipe = read_recipe(open_image(workplace / "fox.png").info)
    assert recipe.task_settings["pnp"] == {
        "feature_blocks": ["up_blocks.2.resnets.0"], "attn_blocks": ["up_blocks.3.attentions.0"],
        "tau_f": 0.5, "tau_attn": 0.25,
    }  # fmt: skip
    assert recipe.task_settings["negative_blend"] == {"schedule": "linear", "alpha": 0.75}
    assert recipe.task_settings["inversion"]["iterations"] == 0
    assert (recipe.width, recipe.height, recipe.guidance_scale) == (48, 36, 3.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("invert", "nothing.png"), "no image at nothing.png"),
        (("invert", "photo.png", "--steps", 0), "steps to be a whole number of 1 or more"),
        (("invert", "photo.png", "--out", "photo.png"), "expected an ending of .inversion"),
        (("translate", "photo.png", "x", "--negative-alpha", 0.5), "needs a --negative-schedule"),
        (("translate", "photo.png", "x", "--tau-features", 2), "expected --tau-features to be a finite number of 0 to 1"),
        (("translate", "photo.png", "x", "--feature-block", "mid_block"), "expected mid_block to be a ResnetBlock"),
        (("translate", "photo.png", "x", "--method", "ddim", "--tau-features", 0.5), "no choice of features"),
        (("translate", "nothing.png", "x"), "no image at nothing.png"),
        (("translate", "photo.png", "x", "--out", "photo.png"), "is there already"),
    ],
)
def test_wrong_use_is_one_line_and_leaves_nothing(command, workplace, sd1, photo, arguments, message):
    done = command(*arguments, "--model", sd1, *(("--steps", 2) if "--steps" not in arguments else ()))
    assert done.code in (1, 2)
    assert len(done.errors) == 1 and message in done.errors[0]
    assert files(workplace) == [photo]


def test_an_inversion_made_with_another_model_is_refused(command, workplace, sd1, photo):
    from tests import peers

    assert command("invert", photo, "--steps", 2, "--no-check", "--model", sd1, "--out", "a.inversion").code == 0
    done = command("translate", "a.inversion", "red fox", "--model", peers.folder("sd2"))
    assert done.code == 1
    assert "the inversion was made with the model 'sd1'" in done.errors[0]


def test_edit_and_inpaint_take_an_inversion(command, workplace, sd1, photo):
    Image.new("L", (64, 48), 255).save("mask.png")
    assert command("invert", photo, "--prompt", "the cat", "--steps", 4, "--no-check", "--model", sd1).code == 0
    done = command(
        "edit", "photo.inversion", "red fox", "--seed", 1, "--model", sd1, "--out", "fox.png", "--compare", "row.png"
    )
    assert (done.code, done.out.split()) == (0, ["fox.png", "row.png"]), done.err
    recipe = read_recipe(open_image("fox.png").info)
    assert (recipe.task, recipe.steps, list(recipe.sources)) == ("edit", 4, ["inversion"])
    options = ("--mask", "mask.png", "--inversion", "photo.inversion", "--seed", 1, "--model", sd1, "--out", "hole.png")
    assert command("inpaint", photo, "red fox", *options).code == 0
    assert set(read_recipe(open_image("hole.png").info).sources) == {"image", "mask", "inversion"}
    for name in ("fox.png", "hole.png"):
        done = command("reproduce", name, "--model", sd1)
        assert (done.code, done.out) == (0, "identical: every pixel is the same\n")
    done = command("edit", "photo.inversion", "red fox", "--steps", 3, "--strength", 1, "--model", sd1)
    assert done.code == 2 and "take its own 4 steps" in done.errors[0]
