from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from latentdiff import Pipeline
from latentdiff.diffusion.latents import start_noise
from latentdiff.image import open_image, save_png
from tests import peers
from tests.cli.conftest import files, load


@pytest.fixture
def drawn(command, sd1, workplace) -> Path:
    command(
        "generate",
        "--model",
        sd1,
        "--steps",
        3,
        "red fox",
        "--negative",
        "cat",
        "--sampler",
        "ddpm",
        "--seed",
        4,
        "--out",
        "a.png",
    )
    return workplace / "a.png"


def edit(path: Path, **changes) -> None:
    """Rewrite fields of an image's JSON recipe."""
    image = open_image(path)
    recipe = json.loads(image.info["latentdiff"])
    image.info["latentdiff"] = json.dumps(recipe | changes)
    save_png(image, path)


def test_identical(command, drawn, sd1, workplace):
    done = command("reproduce", drawn, "--model", sd1)
    assert (done.code, done.out) == (0, "identical: every pixel is the same\n")
    assert files(workplace) == ["a.png"]


def test_image_of_a_batch(command, sd1):
    command("generate", "--model", sd1, "--steps", 3, "cat", "-n", 4, "--seed", 1)
    done = command("reproduce", "images/cat-3.png", "--model", sd1)
    assert done.code == 0


def test_from_the_text_of_the_web_uis(command, drawn, sd1):
    image = open_image(drawn)
    del image.info["latentdiff"]
    save_png(image, drawn)
    assert command("reproduce", drawn, "--model", sd1).out == "identical: every pixel is the same\n"


def test_embedded_model_is_found_by_its_hash(command, drawn, sd1, monkeypatch):
    monkeypatch.setattr(Pipeline, "load", load)
    monkeypatch.setattr("latentdiff.model.loaded.embedded_model", lambda: sd1)
    assert command("reproduce", drawn).out == "identical: every pixel is the same\n"


def test_another_model_is_asked_for(command, drawn, monkeypatch):
    monkeypatch.setattr(Pipeline, "load", load)
    monkeypatch.setattr("latentdiff.model.loaded.embedded_model", lambda: peers.folder("sd2"))
    done = command("reproduce", drawn)
    assert done.code == 1
    assert "made with the model 'sd1'" in done.errors[0] and "--model" in done.errors[0]


def test_difference_and_its_reasons(command, drawn, workplace):
    edit(drawn, versions={"torch": "1.0"}, device="cuda (Old One)")
    done = command("reproduce", drawn, "--model", peers.folder("sd2"), "--out", "new.png")
    assert done.code == 1
    assert "difference: at most" in done.out
    for reason in (
        "model hash: then",
        "torch: then 1.0, now",
        "device: then cuda (Old One), now cpu",
        "latentdiff: then unknown",
    ):
        assert reason in done.out
    difference = np.abs(np.asarray(open_image("new.png")).astype(int) - np.asarray(open_image(drawn)))
    assert f"at most {difference.max()}, on average {difference.mean():.3f} of 255" in done.out


def test_edited_pixels(command, drawn, sd1):
    image = open_image(drawn)
    image.putpixel((3, 3), (255, 0, 255))
    save_png(image, drawn)
    done = command("reproduce", drawn, "--model", sd1)
    assert done.code == 1 and "or edited since" in done.out


def test_resized_image(command, drawn, sd1):
    image = open_image(drawn)
    smaller = image.resize((32, 32))
    smaller.info = image.info
    save_png(smaller, drawn)
    done = command("reproduce", drawn, "--model", sd1)
    assert done.code == 1 and "has been resized" in done.errors[0]


def test_given_start_noise(command, sd1):
    (image,) = peers.ours("sd1")("cat", latents=start_noise([3], (4, 8, 8)), steps=1, progress=False)
    save_png(image, "b.png")
    done = command("reproduce", "b.png", "--model", sd1)
    assert done.code == 1 and "given start noise" in done.errors[0]


@pytest.mark.parametrize("info", [{}, {"latentdiff": "{"}, {"latentdiff": "[" * 5000}, {"parameters": "only words"}])
def test_no_recipe(command, sd1, info):
    image = Image.new("RGB", (8, 8))
    image.info |= info
    save_png(image, "b.png")
    done = command("reproduce", "b.png", "--model", sd1)
    assert done.code == 1 and len(done.errors) == 1 and "recipe" in done.errors[0] or "parameters" in done.errors[0]


@pytest.mark.parametrize(
    "changes", [{"steps": 10**9}, {"width": 12}, {"seed": -1}, {"sampler": "x"}, {"guidance_scale": 1e400}]
)
def test_hostile_recipe(command, drawn, sd1, changes):
    edit(drawn, **changes)
    done = command("reproduce", drawn, "--model", sd1)
    assert done.code in (1, 2) and len(done.errors) == 1


def test_no_image(command):
    done = command("reproduce", "none.png")
    assert done.code == 1 and "no image at none.png" in done.errors[0]
