"""The second, larger pass: against the same walk put together by hand of diffusers' schedule and our image to image."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from latentdiff import Pipeline
from latentdiff.diffusion.denoise import denoise
from latentdiff.diffusion.latents import NoiseStream
from latentdiff.errors import UsageError
from latentdiff.image import to_pil, to_tensor
from latentdiff.recipe import Recipe, read_recipe
from latentdiff.request.foreign.a1111 import read
from latentdiff.request.infotext import split
from latentdiff.request.plan import Sampling
from latentdiff.request.second_pass import LATENT_MODES, SecondPass
from tests import peers
from tests.tasks.images import apart

shared = cache(peers.ours)
QUICK = {"steps": 4, "seed": 3, "progress": False, "sampler": "euler", "spacing": "karras"}


def by_hand(pipe: Pipeline, first: torch.Tensor, size: tuple[int, int], steps: int, total: int, upscale) -> torch.Tensor:
    """A1111's rules: of a schedule of `total` steps the last `steps`, new noise of the same seed, all of them taken."""
    plan = Sampling(**{**QUICK, "steps": total}).plan("cat", pipe.schedule)
    levels = plan.levels[total - steps :]
    larger = upscale(first)
    assert larger.shape[-2:] == size
    noise = NoiseStream([3], tuple(larger.shape[1:]))
    x = levels[0].alpha * larger + levels[0].sigma * noise()
    positive, negative = pipe.encoded(plan)
    with torch.no_grad():
        walk = pipe.denoiser(positive, negative, plan.guidance, levels)
        for step in denoise(walk, x, levels, plan.sampler.step, noise=noise):
            x = step.x
    return x


@pytest.mark.parametrize("upscaler", ["latent", "latent-bicubic-antialiased", "latent-nearest-exact"])
def test_the_walk_is_that_of_the_web_ui(upscaler):
    pipe = shared("sd1")
    mode, antialias = LATENT_MODES[upscaler]
    first = pipe("cat", output="latents", **QUICK)
    found = pipe("cat", hires=1.5, hires_strength=0.6, hires_steps=3, hires_upscaler=upscaler, output="latents", **QUICK)
    upscale = lambda x: F.interpolate(x, size=(12, 12), mode=mode, antialias=antialias)  # noqa: E731
    torch.testing.assert_close(found, by_hand(pipe, first, (12, 12), 3, 5, upscale), rtol=1e-5, atol=1e-5)


def test_lanczos_enlarges_pixels():
    pipe = shared("sd1")
    first = pipe("cat", output="latents", **QUICK)

    def upscale(latents: torch.Tensor) -> torch.Tensor:
        (image,) = to_pil(pipe.decode(latents))
        return pipe.encode_images(to_tensor([image.resize((128, 128), Image.Resampling.LANCZOS)])).mode()

    found = pipe("cat", hires="2x", hires_upscaler="lanczos", output="latents", **QUICK)
    torch.testing.assert_close(found, by_hand(pipe, first, (16, 16), 4, 8, upscale), rtol=1e-5, atol=1e-5)


def test_recipe_and_the_image_again():
    pipe = shared("sd1")
    images = pipe("cat", hires=2, hires_strength=0.3, num_images=2, **QUICK)
    recipe = read_recipe(images[1].info)
    assert images[1].size == (128, 128) and (recipe.width, recipe.height, recipe.hires) == (64, 64, 2.0)
    again = pipe(recipe.prompt, width=64, height=64, **recipe.sampling(), **recipe.generating())[0]
    assert apart(images[1], again) <= 1  # though it was made in a batch
    read_back = Recipe.from_parameters(recipe.to_parameters())
    assert read_back.generating() == recipe.generating()
    assert read_back.width == 64
    plain = read_recipe(pipe("cat", **QUICK)[0].info)
    assert "Hires" not in plain.to_parameters() and plain.hires is None


def test_web_uis_read_the_same_of_our_text():
    text = read_recipe(shared("sd1")("cat", hires=1.5, hires_steps=2, hires_upscaler="latent-bicubic", **QUICK)[0].info)
    words = split(text.to_parameters()).settings
    assert {name: words[name] for name in words if "ires" in name or "Deno" in name or name == "Size"} == {
        "Size": "64x64", "Hires upscale": "1.5", "Hires upscaler": "Latent (bicubic)", "Hires steps": "2",
        "Denoising strength": "0.5",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hires": 1.0}, "above 1 to 8"),
        ({"hires": "many"}, "above 1 to 8"),
        ({"hires": 20}, "above 1 to 8"),
        ({"hires_steps": 3}, "expected hires, how much larger, with hires_steps"),
        ({"hires": 2, "hires_upscaler": "magic"}, "hires_upscaler to be one of latent"),
        ({"hires": 2, "hires_strength": 0.0}, "hires_strength to be a finite number of 0.001 to 1"),
        ({"hires": 2, "hires_strength": 0.002}, "steps must be 1 to 1000|steps to be|number of training timesteps"),
    ],
)
def test_bad_values(options, message):
    with pytest.raises(UsageError, match=message) as error:
        shared("sd1")("cat", **QUICK, **options)
    assert "\n" not in str(error.value)


def test_own_levels_have_no_second_pass():
    with pytest.raises(UsageError, match="leave sigmas and timesteps out"):
        shared("sd1")("cat", hires=2, sigmas=[10.0, 5.0, 1.0], seed=1, progress=False, sampler="euler")


def test_a_walk_that_goes_up_again():
    """Of restart the steps of the first way down count, and the stretches that it walks again are walked."""
    pipe = shared("sd1")
    plan = Sampling(steps=20, sampler="restart", seed=1).plan("cat", pipe.schedule)
    levels = SecondPass(2.0, "latent", 0.5, 20).plan(plan, pipe.schedule).levels
    assert max(level.sigma_hat for level in levels) == levels[0].sigma_hat and levels[-1].is_clean


HIRES = "a cat\nSteps: 20, Sampler: Euler, CFG scale: 7, Seed: 1, Size: 512x512, Denoising strength: 0.6, RNG: CPU, "


@pytest.mark.parametrize(
    ("words", "options", "verdicts"),
    [
        ("Hires upscale: 2, Hires steps: 10, Hires upscaler: Latent",
         {"hires": 2.0, "hires_steps": 10, "hires_upscaler": "latent", "hires_strength": 0.6}, set()),
        ("Hires upscale: 1.5, Hires upscaler: Latent (nearest-exact), Hires sampler: Use same sampler, Hires CFG Scale: 7",
         {"hires": 1.5, "hires_upscaler": "latent-nearest-exact"}, set()),
        ("Hires resize: 768x768, Hires upscaler: Lanczos", {"hires": 1.5, "hires_upscaler": "lanczos"}, {"Hires upscaler"}),
        ("Hires upscale: 2, Hires upscaler: 4x-UltraSharp", {"hires": 2.0, "hires_upscaler": "lanczos"}, {"Hires upscaler"}),
        ("Hires upscale: 2, Hires sampler: DPM++ 2M, Hires prompt: a dog", {"hires": 2.0}, {"Hires sampler", "Hires prompt"}),
        ("Hires resize: 1024x768, Hires upscaler: Latent", {"hires": None}, None),
    ],
)  # fmt: skip
def test_hires_fields_of_the_web_ui(words, options, verdicts):
    found = read(split(HIRES + words))
    assert {name: found.options.get(name) for name in options} == options
    assert found.task == "generate" and not found.lacking
    unlike = {one.name for one in found.of("approximated", "refused") if "not said" not in one.name}
    assert verdicts is None or unlike == verdicts
