"""FreeU against diffusers on the same random weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from latentdiff.networks.freeu import freeu, scaled_lows
from latentdiff.networks.kernels import has_taps
from latentdiff.recipe import read_recipe
from tests import peers
from tests.tasks.images import apart

FACTORS = (1.5, 1.6, 0.9, 0.2)


@pytest.mark.parametrize(("family", "size"), [("sd1", (32, 32)), ("sd1", (16, 24)), ("sd2", (16, 16)), ("xl", (8, 12))])
def test_it_is_that_of_diffusers(family, size):
    ours, theirs = peers.ours(family), peers.theirs(family)
    latents = {"output": "latents", "steps": 2, "progress": False, "seed": 3, "sampler": "ddim"}
    pixels = {"height": 8 * size[0], "width": 8 * size[1]}
    theirs.enable_freeu(b1=FACTORS[0], b2=FACTORS[1], s1=FACTORS[2], s2=FACTORS[3])
    try:
        expected = theirs(
            "the cat", num_inference_steps=2, guidance_scale=4.0, generator=torch.Generator().manual_seed(3),
            output_type="latent", **pixels,
        ).images  # fmt: skip
    finally:
        theirs.disable_freeu()
    found, plain = (ours("the cat", guidance_scale=4.0, freeu=one, **pixels, **latents) for one in (FACTORS, None))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert (found - plain).abs().max() > 0.05
    assert not has_taps(ours.unet)


def test_lows_are_the_mean_and_the_slowest_waves():
    x = torch.randn(2, 3, 6, 5)
    torch.testing.assert_close(scaled_lows(x, 1.0), x)
    torch.testing.assert_close(scaled_lows(torch.full((1, 1, 4, 4), 2.0), 0.3), torch.full((1, 1, 4, 4), 0.6))
    torch.testing.assert_close(scaled_lows(x[..., :1, :1], 0.5), 0.5 * x[..., :1, :1])
    fast = torch.tensor([1.0, -1.0]).repeat(4).expand(1, 1, 8, 8)
    torch.testing.assert_close(scaled_lows(fast, 0.0), fast)
    assert scaled_lows(x.bfloat16(), 0.5).dtype is torch.bfloat16


def test_factors_of_one_change_nothing_and_recipes_hold_others():
    pipe, quick = peers.ours("sd1"), {"steps": 2, "seed": 1, "progress": False}
    plain = pipe("cat", **quick)[0]
    assert np.array_equal(pipe("cat", freeu=(1, 1, 1, 1), **quick)[0], plain)
    with freeu(pipe.unet, (1.0, 1.0, 1.0, 1.0)):
        assert not has_taps(pipe.unet)
    image = pipe("cat", freeu="1.5,1.6,0.9,0.2", **quick)[0]
    recipe = read_recipe(image.info)
    assert recipe.freeu == FACTORS and apart(image, plain) > 0
    assert apart(pipe("cat", **recipe.sampling(), progress=False)[0], image) == 0
