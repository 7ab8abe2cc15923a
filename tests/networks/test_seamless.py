"""Seamless images: shifted noise gives the shifted image."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from PIL.Image import Image

from latentdiff import Pipeline
from latentdiff.errors import UsageError
from latentdiff.networks.seamless import seamless
from latentdiff.recipe import Recipe, read_recipe
from latentdiff.request.foreign.a1111 import read
from latentdiff.request.infotext import split
from tests import peers
from tests.tasks.images import apart

shared = cache(peers.ours)
QUICK = {"steps": 2, "seed": 1, "progress": False}
DIMS = {"x": 3, "y": 2}


def noise(height: int = 16, width: int = 24) -> torch.Tensor:
    return torch.randn(1, 4, height, width, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("axes", ["x", "y", "xy"])
def test_the_networks_commute_with_shifts_along_the_axes_and_no_others(axes):
    """By whole cells of the coarsest level of the U-Net, and by any of the VAE's."""
    pipe, x = shared("sd1"), noise()
    text = pipe.encode(["cat"])
    with torch.no_grad(), seamless(axes, [pipe.unet, pipe.vae]):
        outputs = pipe.unet(x, 500.0, text), pipe.vae.decode(x)
        for axis, dim in DIMS.items():
            found = pipe.unet(x.roll(8, dim), 500.0, text), pipe.vae.decode(x.roll(3, dim))
            for one, other, shift in zip(found, outputs, (8, 24), strict=True):
                same = torch.allclose(one, other.roll(shift, dim), rtol=1e-4, atol=1e-4)
                assert same == (axis in axes), axis


def test_afterwards_the_networks_are_as_they_were():
    pipe, x = shared("sd1"), noise()
    with torch.no_grad():
        before = pipe.vae.decode(x)
        forms = [dict(module.__dict__) for module in pipe.vae.modules()]
        with pytest.raises(ZeroDivisionError), seamless("xy", [pipe.vae]):
            _ = 1 / 0
        assert [dict(module.__dict__).keys() for module in pipe.vae.modules()] == [form.keys() for form in forms]
        assert torch.equal(pipe.vae.decode(x), before)


def pixels(image: Image) -> torch.Tensor:
    return torch.tensor(np.asarray(image).astype(int))  # (height, width, 3)


def test_images_tile():
    pipe = shared("sd1")
    options = {**QUICK, "sampler": "euler", "guidance_scale": 3.0}
    plain, shifted, usual = (
        pipe("cat", latents=latents, **more, **options)[0]
        for latents, more in ((noise(), {"seamless": "xy"}), (noise().roll((8, 16), (2, 3)), {"seamless": "xy"}), (noise(), {}))
    )
    rolled = pixels(plain).roll((64, 128), (0, 1))
    assert (rolled - pixels(shifted)).abs().max() <= 1
    assert apart(plain, usual) > 2


def test_recipes_and_texts():
    (image,) = shared("sd1")("cat", seamless="x", **QUICK)
    recipe = read_recipe(image.info)
    assert recipe.seamless == "x" and Recipe.from_parameters(recipe.to_parameters()).seamless == "x"
    assert apart(shared("sd1")("cat", width=64, height=64, **recipe.sampling(), **recipe.generating())[0], image) == 0
    found = read(split("a cat\nSteps: 20, Sampler: Euler, CFG scale: 7, Seed: 1, Size: 512x512, Tiling: True"))
    assert found.options["seamless"] == "xy" and not found.of("refused")


def test_what_cannot_go_around():
    pipe = Pipeline.load(peers.folder("sd1"), device="cpu", precision="fp32", low_memory=True)
    with pytest.raises(UsageError, match="seamless needs the back end torch"):
        pipe("cat", seamless="x", **QUICK)
    with pytest.raises(UsageError, match="seamless to be one of x, y, xy"):
        shared("sd1")("cat", seamless="z", **QUICK)
