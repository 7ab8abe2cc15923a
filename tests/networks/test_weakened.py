"""PAG and SEG against diffusers on the same random weights."""

from __future__ import annotations

import math
from contextlib import ExitStack
from copy import copy

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPAGPipeline, StableDiffusionXLPAGPipeline
from diffusers.guiders import SmoothedEnergyGuidance
from diffusers.hooks.smoothed_energy_guidance_utils import _gaussian_blur_2d

from latentdiff.diffusion.config import ScheduleConfig
from latentdiff.diffusion.guidance import Guidance, guided_denoiser
from latentdiff.diffusion.guidance_kinds import Weakening
from latentdiff.diffusion.parameterization import parameterization
from latentdiff.diffusion.schedule import Schedule
from latentdiff.errors import UsageError
from latentdiff.networks.kernels import has_taps
from latentdiff.networks.weakened import blurred_map, weakened_model
from latentdiff.recipe import read_recipe
from tests import peers
from tests.diffusion.test_guidance import Spy, contexts, randn
from tests.tasks.images import apart

SIZE = {"width": 192, "height": 192}  # three by three cells in the middle
LEVEL = Schedule(ScheduleConfig()).level(500)
QUICK = {"steps": 3, "seed": 7, "sampler": "ddim", "progress": False, **SIZE}


@pytest.mark.parametrize(
    ("family", "scale", "guidance"), [("sd1", 40.0, 5.0), ("sd1", 40.0, 1.0), ("xl", 40.0, 5.0)]
)
def test_pag_is_that_of_diffusers(family, scale, guidance):
    """The scale is large, as perturbing a random model changes little."""
    kind = StableDiffusionXLPAGPipeline if family == "xl" else StableDiffusionPAGPipeline
    own = {"add_watermarker": False} if family == "xl" else {"requires_safety_checker": False}
    theirs = kind(**copy(peers.theirs(family).components), **own)
    theirs.set_progress_bar_config(disable=True)
    kept = theirs.unet.attn_processors
    try:
        expected = theirs(
            "the cat", negative_prompt="red fox", num_inference_steps=3, guidance_scale=guidance, pag_scale=scale,
            generator=torch.Generator().manual_seed(7), output_type="latent", **SIZE,
        ).images  # fmt: skip
    finally:
        theirs.unet.set_attn_processor(kept)
    pipe = peers.ours(family)
    options = {**QUICK, "negative_prompt": "red fox", "guidance_scale": guidance, "output": "latents"}
    found, plain = (pipe("the cat", pag_scale=one, **options) for one in (scale, 0.0))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert (found - plain).abs().max() > 0.02
    assert not has_taps(pipe.unet)


@pytest.mark.parametrize("side", [24, 32])
@pytest.mark.parametrize("blur", [0.4, 1.0, 3.0, math.inf])
def test_queries_are_blurred_as_in_diffusers(side, blur):
    pipe, theirs = peers.ours("sd1"), peers.theirs("sd1").unet
    x, text = torch.randn(2, 4, side, side), torch.randn(2, 77, theirs.config.cross_attention_dim)
    # What they take for infinite is blurred, and what for finite is averaged: so the threshold is chosen to fit.
    kernel = 1 if math.isinf(blur) else math.ceil(6 * blur) + 1 - math.ceil(6 * blur) % 2
    threshold = math.inf if math.isinf(blur) else 0.0
    queries = [module.to_q for name, module in theirs.named_modules() if "mid_block" in name and name.endswith("attn1")]
    with ExitStack() as stack, torch.no_grad():
        for module in queries:
            handle = module.register_forward_hook(lambda m, i, out: _gaussian_blur_2d(out, kernel, blur, threshold))
            stack.callback(handle.remove)
        expected = theirs(x, 500, text).sample
        plain = pipe.unet(x, 500, text)
        found = weakened_model(pipe.unet, pipe.unet, Weakening(3.0, blur))(x, 500, text)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert (found - plain).abs().max() > 1e-4


def test_a_map_need_not_be_square():
    x = torch.randn(1, 3, 1, 5)
    assert torch.equal(blurred_map(x, 0.0), x)
    for blur in (1.0, math.inf):
        found = blurred_map(x.expand(-1, -1, 4, -1), blur)
        torch.testing.assert_close(found, blurred_map(x, blur).expand(-1, -1, 4, -1))
    torch.testing.assert_close(blurred_map(torch.ones(1, 2, 3, 7), 2.0), torch.ones(1, 2, 3, 7))


def test_the_sum_is_that_of_diffusers_guider():
    x, (positive, negative) = randn(2, 4, 3, 5), contexts()
    guider = SmoothedEnergyGuidance(4.0, 2.8, seg_guidance_layers=[0], seg_guidance_start=0.0, seg_guidance_stop=1.0)
    guider.set_state(step=1, num_inference_steps=10, timestep=500)
    weak = 0.5 * x
    expected = guider.forward(x + positive, x + negative, weak).pred
    guidance = Guidance(scale=4.0, weakening=Weakening(2.8))
    spies = Spy(), Spy()

    def weakened(latents, t, context):
        spies[1](latents, t, context)
        return 0.5 * latents

    found = guided_denoiser(spies[0], parameterization("epsilon"), positive, negative, guidance, weakened)(x, LEVEL)
    torch.testing.assert_close(found.raw, expected, rtol=1e-12, atol=1e-12)
    assert (spies[0].batches, spies[1].batches) == ([4], [2])


@pytest.mark.parametrize("kind", ["apg", "zero-star", "threshold"])
def test_other_kinds_are_pushed_too(kind):
    """At scale 1 they are the positive output; at others, with a large range, guided and pushed."""
    x, (positive, negative) = randn(2, 4, 3, 5), contexts()
    epsilon = parameterization("epsilon")

    def raw(**options) -> torch.Tensor:
        guidance = Guidance(kind=kind, scale=1.7, percentile=1.0, **options)
        return guided_denoiser(Spy(), epsilon, positive, negative, guidance, lambda x, t, c: 0.5 * x)(x, LEVEL).raw

    moved = raw(weakening=Weakening(0.01)) - raw()
    if kind == "threshold":  # which keeps the sum within its range
        assert moved.abs().max() > 1e-4
    else:
        torch.testing.assert_close(moved, 0.01 * (0.5 * x + positive), rtol=1e-6, atol=1e-8)


def test_it_acts_within_the_interval_alone():
    x, (positive, negative) = randn(2, 4, 3, 5), contexts()
    outside = Guidance(scale=4.0, interval=(0.0, 0.1), weakening=Weakening(2.0))

    def fail(*arguments):
        raise AssertionError

    found = guided_denoiser(Spy(), parameterization("epsilon"), positive, negative, outside, fail)(x, LEVEL)
    assert torch.equal(found.raw, x + positive) and not found.guided


def test_recipes_hold_it():
    pipe = peers.ours("sd1")
    plain = pipe("cat", **QUICK)[0]
    for options in ({"pag_scale": 400.0}, {"seg_scale": 400.0}, {"seg_scale": 400.0, "seg_blur": 1.0}):
        image = pipe("cat AND dog :0.5", num_images=1, **options, **QUICK)[0]
        assert apart(image, plain) > 2
        recipe = read_recipe(image.info)
        assert apart(pipe(recipe.prompt, **SIZE, **recipe.sampling(), progress=False)[0], image) == 0
        said = read_recipe({"parameters": recipe.to_parameters()})
        assert {name: getattr(said, name) for name in options} == options
    assert np.array_equal(pipe("cat", pag_scale=0.0, seg_scale=0.0, **QUICK)[0], plain)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pag_scale": 3.0, "seg_scale": 3.0}, "pag_scale or seg_scale, found both, 3 and 3"),
        ({"pag_scale": 3.0, "cache_interval": 2}, "PAG and SEG act on layers that a cache leaves out"),
        ({"freeu": (1.5, 1.6, 0.9, 0.2), "cache_interval": 2}, "FreeU's factors act on layers that a cache leaves out"),
        ({"pag_scale": 3.0, "guidance_kind": "cfg++", "guidance_scale": 0.5}, "go with other kinds than cfg\\+\\+"),
        ({"pag_scale": -1.0}, "pag_scale to be a finite number of 0 or more, found -1.0"),
        ({"seg_blur": float("nan")}, "seg_blur to be a finite number of 0 or more"),
        ({"freeu": (1.5, 1.6)}, "freeu to be 4 finite numbers of 0 or more, found \\(1.5, 1.6\\)"),
    ],
)
def test_what_does_not_go_together(options, message):
    with pytest.raises(UsageError, match=message):
        peers.ours("sd1")("cat", steps=2, progress=False, **options)
