"""The command upscale, a hires pass by an upscaler's file, and `reproduce` on what they made."""

from __future__ import annotations

import pytest
import torch

from latentdiff.image import open_image, save_png, to_pil, to_tensor
from latentdiff.recipe import read_recipe
from tests import peers, upscalers
from tests.cli.conftest import files
from tests.tasks.images import an_image, apart

QUICK = ("--steps", 2, "--seed", 5)


@pytest.fixture
def sources(workplace):
    save_png(an_image(24, 20), "photo.png")
    upscalers.saved(upscalers.esrgan(2), workplace / "2x.safetensors")


def test_upscale_and_reproduce(command, sources, workplace):
    done = command("upscale", "photo.png", "--model", "2x.safetensors")
    assert (done.code, done.out) == (0, "images/photo-2x.png\n")
    assert open_image("images/photo-2x.png").size == (48, 40)
    roles = ("--source", "image=photo.png", "--source", "upscaler=2x.safetensors")
    done = command("reproduce", "images/photo-2x.png", *roles)
    assert (done.code, done.out) == (0, "identical: every pixel is the same\n")
    assert files(workplace) == ["2x.safetensors", "images/photo-2x.png", "photo.png"]
    done = command("upscale", "photo.png", "--model", "2x.safetensors", "--out", "images")
    assert done.out == "images/photo-2x-2.png\n"


def test_diffusion_and_reproduce(command, sd1, sources, workplace):
    options = ("--model", "2x.safetensors", "--diffusion", sd1, "--prompt", "a cat", "--strength", 0.7, *QUICK)
    done = command("upscale", "photo.png", *options, "--out", "large.png")
    assert done.code == 0, done.err
    done = command("reproduce", "large.png", "--model", sd1)
    assert (done.code, done.out) == (0, "identical: every pixel is the same\n")
    done = command("upscale", "photo.png", "--model", "2x.safetensors", "--steps", 3)
    assert done.code == 2 and "expected --diffusion with --steps" in done.err


def test_the_command_tells_it_from_other_upscalers(command, workplace):
    save_png(an_image(12, 8), "photo.png")
    model = peers.folder("x4")
    done = command("upscale", "photo.png", "--model", model, "--steps", 2, "--seed", 1, "--noise-level", 30)
    assert (done.code, done.out) == (0, "images/photo-4x.png\n")
    assert open_image("images/photo-4x.png").size == (48, 32)
    done = command("reproduce", "images/photo-4x.png", "--model", model, "--source", "image=photo.png")
    assert (done.code, done.out) == (0, "identical: every pixel is the same\n")
    done = command("upscale", "photo.png", "--model", model, "--tile", 256)
    assert done.code == 2 and "expected no --tile with a diffusion model" in done.errors[-1]
    done = command("upscale", "photo.png", "--model", peers.folder("sd1"), "--steps", 2)
    assert done.code == 2 and "expected a model that enlarges images, found one for text" in done.errors[-1]


def test_another_upscaler_is_noticed(command, sources, workplace):
    command("upscale", "photo.png", "--model", "2x.safetensors", "--out", "large.png")
    upscalers.saved(upscalers.esrgan(2, seed=1), workplace / "2x.safetensors")
    done = command("reproduce", "large.png")
    assert done.code == 1 and "is not the upscaler that the recipe names" in done.err


@pytest.mark.parametrize(
    "arguments, line",
    [
        (("--model", "photo.png"), "is a PNG image"),
        (("--model", "none.pth"), "no upscaler at none.pth"),
        (("--model", "2x.safetensors", "--tile", 100), "expected a tile of 128 pixels or more"),
        (("--model", "2x.safetensors", "--out", "photo.png"), "photo.png is there already"),
    ],
)
def test_bad_input_is_one_line(command, sources, arguments, line):
    done = command("upscale", "photo.png", *arguments)
    assert done.code and line in done.errors[0] and len(done.err.splitlines()) == 1


def test_without_spandrel_it_says_what_to_install(command, sources, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "spandrel", None)
    done = command("upscale", "photo.png", "--model", "2x.safetensors")
    assert done.code == 1 and "pip install 'latentdiff[upscale]'" in done.err


def test_inspect_names_it(command, sources, workplace):
    torch.save({"params_ema": upscalers.new_names(upscalers.esrgan())}, workplace / "4x.pth")
    for name in ("2x.safetensors", "4x.pth"):
        assert "upscaler of the ESRGAN family" in command("inspect", name).out
    done = command("generate", "cat", "--model", "2x.safetensors")
    assert done.code == 1 and "`latentdiff upscale` takes" in done.err


def test_hires_by_a_file_and_reproduce(command, sd1, sources, workplace):
    hires = ("--hires", "2x", "--hires-upscaler", "2x.safetensors", "--hires-strength", "0.5")
    done = command("generate", "cat", *QUICK, "--model", sd1, *hires, "--out", "large.png")
    assert done.code == 0, done.err
    recipe = read_recipe(open_image("large.png").info)
    assert recipe.hires_upscaler == "2x.safetensors" and "Hires upscaler: 2x" in recipe.to_parameters()
    done = command("reproduce", "large.png", "--model", sd1)
    assert (done.code, done.out) == (0, "identical: every pixel is the same\n")
    done = command("generate", "cat", *QUICK, "--model", sd1, *hires, "--out", "large.png", "--skip-existing")
    assert "large.png is there already" in done.err
    done = command("generate", "cat", *QUICK, "--model", sd1, "--hires", "2x", "--hires-upscaler", "none.pth")
    assert done.code == 2 and "lanczos, or a file" in done.err


def test_hires_by_a_file_is_the_upscaler_between_the_passes():
    from latentdiff.networks.upscaling.model import Upscaler

    pipe = peers.ours("sd1")
    path = upscalers.saved(upscalers.esrgan(2), peers.folder("sd1").parent / "2x.safetensors")
    quick = {"steps": 2, "seed": 3, "progress": False}
    first = pipe("cat", output="latents", **quick)
    seen = []
    pipe.encode_images, encode = lambda images, **own: seen.append(images) or encode(images, **own), pipe.encode_images
    pipe("cat", hires=2, hires_upscaler=path, **quick)
    expected = Upscaler.load(path)(to_pil(pipe.decode(first))[0])
    torch.testing.assert_close(seen[0], to_tensor([expected]))
    pipe("cat", hires=1.5, hires_upscaler=path, **quick)
    assert seen[1].shape == (1, 3, 96, 96) and apart(to_pil(seen[1])[0], expected.resize((96, 96))) < 255
