"""Every command writes the format that the ending of a name asks for, and reads its recipe back."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from latentdiff.image import open_image, save_image
from latentdiff.networks.tiny_vae import TinyVAE, TinyVAEConfig
from latentdiff.recipe import Recipe, read_recipe
from tests.cli.conftest import files

FORMATS = {"cat.jpg": "JPEG", "Cat.JPEG": "JPEG", "cat.webp": "WEBP", "cat.avif": "AVIF", "CAT.PNG": "PNG"}
QUICK = ("--steps", 1, "--seed", 4)


@pytest.fixture
def make(command, sd1, workplace):
    """A command with a small model, in an empty folder; PNG for comparison in a.png."""

    def run(name, *arguments):
        return command(name, *arguments, "--model", sd1)

    assert run("generate", "red fox", *QUICK, "--out", "a.png").code == 0
    return run


@pytest.mark.parametrize(("name", "kind"), FORMATS.items())
def test_generate_and_reproduce(make, name, kind):
    assert make("generate", "red fox", *QUICK, "--out", name).out == f"{name}\n"
    image, png = open_image(name), open_image("a.png")
    assert image.format == kind and image.size == png.size
    assert read_recipe(image.info) == read_recipe(png.info)
    done = make("reproduce", name)
    assert done.code == 0
    assert ("identical" in done.out) == (kind == "PNG")
    if kind != "PNG":
        assert f"{kind} does not keep pixels exactly" in done.out and "as near as such files keep images" in done.out
        nearness = float(done.out.split(" exactly: ")[1].split(" dB")[0])
        error = np.square(np.asarray(image.convert("RGB"), float) - np.asarray(png.convert("RGB"), float)).mean()
        assert nearness == pytest.approx(20 * np.log10(255) - 10 * np.log10(error), abs=0.06)


def test_a_lossy_file_of_another_image(make):
    make("generate", "red fox", *QUICK, "--out", "cat.jpg")
    other = Image.fromarray(255 - np.asarray(open_image("cat.jpg")))
    other.info = dict(open_image("cat.jpg").info)
    save_image(other, "other.jpg")
    done = make("reproduce", "other.jpg")
    assert done.code == 1 and "but such a file keeps this image to" in done.out


def test_a_lossless_webp_is_compared_exactly(make):
    make("generate", "red fox", *QUICK, "--out", "cat.webp", "--quality", 100)
    assert make("reproduce", "cat.webp", "--out", "again.avif").out.endswith("identical: every pixel is the same\n")
    assert open_image("again.avif").format == "AVIF"


def test_a_folder_in_another_format(make, workplace):
    run = ("generate", "red fox", "cat", *QUICK, "--format", "webp", "--out", "made", "--skip-existing")
    assert make(*run, "--sheet", "sheet.jpg").out.split() == ["made/red-fox-4.webp", "made/cat-4.webp", "sheet.jpg"]
    assert open_image("made/cat-4.webp").format == "WEBP" and open_image("sheet.jpg").format == "JPEG"
    done = make(*run)
    assert done.out == "" and done.err.count("is there already") == 2
    assert make("interpolate", "a", "b", *QUICK, "--frames", 2, "--format", "jpg").code == 0
    assert files(workplace / "frames") == ["frame-000.jpg", "frame-001.jpg"]
    assert make("reproduce", "frames/frame-001.jpg").code == 0


def test_tasks(make):
    Image.new("L", (64, 64), 255).save("mask.png")
    for name, arguments in {
        "edit": ("a.png", "cat"),
        "inpaint": ("a.png", "cat", "--mask", "mask.png"),
        "translate": ("a.png", "cat", "--method", "ddim"),
        "restore": ("a.png", "--operator", "colourise"),
    }.items():
        options = () if name in ("translate", "restore") else ("--seed", 1)
        done = make(name, *arguments, "--steps", 2, *options, "--out", f"{name}.jpg", "--compare", f"{name}.webp")
        assert done.out.split() == [f"{name}.jpg", f"{name}.webp"], done.err
        assert open_image(f"{name}.jpg").format == "JPEG" and open_image(f"{name}.webp").format == "WEBP"
        assert read_recipe(open_image(f"{name}.jpg").info).task == name
        assert make("reproduce", f"{name}.jpg").code == 0


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("generate", "cat", "--out", "cat.tiff"), ".webp, .avif or the name of a folder, found .tiff"),
        (("generate", "cat", "--out", "cat.BMP"), "found .BMP"),
        (("generate", "cat", "--out", "cat.gif"), "found .gif"),
        (("generate", "cat", "dog", "--out", "cat.jpg"), "expected a folder for 2 images"),
        (("generate", "cat", "-n", 2, "--out", "cat.WEBP"), "expected a folder for 2 images"),
        (("generate", "cat", "--sheet", "sheet"), "expected --sheet FILE with an ending of .png"),
        (("generate", "cat", "--preview", "x.tif"), "found .tif"),
        (("generate", "cat", "--out", "cat.jpg", "--format", "webp"), "expected a folder with --format webp"),
        (("generate", "cat", "--out", "folder.jpg"), "it is a folder"),
        (("interpolate", "a", "b", "--out", "a.webp"), "expected a folder for 24 images"),
        (("edit", "a.png", "cat", "--out", "x.tga"), "found .tga"),
        (("edit", "a.png", "cat", "--compare", "row.bmp"), "found .bmp"),
        (("edit", "a.png", "cat", "--out", "a.png"), "a.png is there already"),
        (("reproduce", "a.png", "--out", "b.gif"), "found .gif"),
        (("generate", "cat", "--quality", 0), "0 is not in the range"),
    ],
)
def test_what_cannot_be_written(command, sd1, workplace, arguments, reason):
    recipe = Recipe(prompt="", seed=1, steps=1, sampler="ddim", guidance_scale=1.0, width=8, height=8)
    image = Image.new("RGB", (8, 8))
    image.info = dict(recipe.to_chunks())
    save_image(image, "a.png")
    (workplace / "folder.jpg").mkdir()
    before = files(workplace)
    done = command(*arguments, "--model", sd1)
    assert done.code == 2 and len(done.errors) == 1 and reason in done.errors[0]
    assert files(workplace) == before


def test_the_parts_of_a_recipe_are_found_again(command, make, sd1, workplace):
    """Beside the image or here, and only if they are the same."""
    tiny = workplace / "taesd.safetensors"
    torch.manual_seed(0)
    save_file(TinyVAE(TinyVAEConfig()).state_dict(), tiny)
    (workplace / "made").mkdir()
    parts = ("--vae", tiny, "--text-encoder", f"{sd1}/text_encoder")
    assert make("generate", "cat", *QUICK, *parts, "--out", "made/cat.png").code == 0
    recipe = read_recipe(open_image("made/cat.png").info)
    assert [entry["file"] for entry in recipe.parts.values()] == ["taesd.safetensors", "text_encoder"]
    encoder = ("--text-encoder", f"{sd1}/text_encoder")
    assert make("reproduce", "made/cat.png", *encoder).out.startswith("identical")
    tiny.rename(workplace / "made" / tiny.name)
    assert make("reproduce", "made/cat.png", *encoder).out.startswith("identical")
    done = make("reproduce", "made/cat.png")
    assert done.code == 1 and "say where it is with --text-encoder" in done.errors[0]
    save_file(TinyVAE(TinyVAEConfig()).state_dict(), workplace / "made" / tiny.name)
    done = make("reproduce", "made/cat.png", *encoder)
    assert done.code == 1 and "is not the vae that the image was made with" in done.errors[0]
