"""Windows: against diffusers' StableDiffusionPanoramaPipeline, and what has to hold whatever the model."""

from __future__ import annotations

from copy import copy
from functools import cache, partial

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPanoramaPipeline

from latentdiff import ControlNet, image_to_image
from latentdiff.errors import UsageError
from latentdiff.networks.windows import Windows, windowed
from latentdiff.recipe import read_recipe
from tests import peers
from tests.adapters.control import nets
from tests.tasks.images import an_image, apart

shared = cache(peers.ours)
QUICK = {"steps": 3, "seed": 3, "progress": False}
WIDE = {"width": 112, "height": 64, "window": 64, "window_stride": 16, **QUICK}


def panorama(*, circular: bool, output: str):
    """diffusers' image of 64 x 112 pixels, its windows of 64 and strides of 8 latents made 8 and 2."""
    parts = copy(peers.theirs("sd1").components)
    parts["scheduler"] = DDIMScheduler.from_config({**parts["scheduler"].config, "clip_sample": False})
    pipe = StableDiffusionPanoramaPipeline(**parts, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    pipe.get_views = partial(StableDiffusionPanoramaPipeline.get_views, pipe, window_size=8, stride=2)
    return pipe(
        "cat", height=64, width=112, num_inference_steps=3, guidance_scale=5.0, circular_padding=circular,
        generator=torch.Generator().manual_seed(3), output_type=output,
    ).images  # fmt: skip


def test_one_grey_level_from_diffusers():
    (found,) = shared("sd1")("cat", **WIDE)
    assert found.size == (112, 64)
    assert apart(found, (panorama(circular=False, output="np")[0] * 255).round().astype(int)) <= 1
    assert apart(found, shared("sd1")("cat", **{**WIDE, "window": 112})[0]) > 1  # windows do something


@pytest.mark.parametrize("family", ["sd1", "sd2", "xl"])
def test_a_window_over_all_is_the_plain_image(family):
    pipe = shared(family)
    small = {**QUICK, "steps": 2}
    (plain,), (seen) = pipe("cat", **small), pipe("cat", window=512, **small)
    assert apart(plain, seen[0]) == 0


def test_the_seam_goes_around():
    """Noise shifted by a stride gives latents shifted by it, at any size of the windows."""
    pipe = shared("sd1")
    noise = torch.randn(1, 4, 8, 16, generator=torch.Generator().manual_seed(0))
    options = {**WIDE, "width": 128, "seamless": "x", "output": "latents"}
    found = pipe("cat", latents=noise, **options)
    shifted = pipe("cat", latents=noise.roll(4, dims=-1), **options)
    torch.testing.assert_close(shifted, found.roll(4, dims=-1), rtol=1e-3, atol=1e-3)
    open_ended = pipe("cat", latents=noise.roll(4, dims=-1), **{**options, "seamless": None})
    assert (open_ended - found.roll(4, dims=-1)).abs().max() > 0.05


def test_places_are_cut_with_the_window():
    """A model that only tells what it is told, of every place: hints and masks land where they were."""

    class Told:
        def __init__(self, values):
            self.values = values

        def cut(self, area):
            return Told(self.values[..., *area])

    values = torch.randn(1, 1, 9, 21)
    model = windowed(lambda x, t, told: torch.cat([x, told.values], dim=1), Windows(6, 4, "x"))
    x = torch.randn(1, 2, 9, 21)
    torch.testing.assert_close(model(x, 1.0, Told(values)), torch.cat([x, values], dim=1))


def test_memory_is_bounded_by_the_window():
    pipe, seen = peers.ours("sd1"), []
    network = pipe.unet
    pipe.network = lambda x, *rest: seen.append(x.shape[-2:]) or network(x, *rest)
    pipe("cat", width=160, height=96, window=64, **{**QUICK, "steps": 1})
    assert set(seen) == {(8, 8)} and len(seen) == 2 * 4


def test_a_control_is_cut_with_the_window(tmp_path):
    pipe = shared("sd1")
    network = ControlNet.load(nets.saved(tmp_path))
    image = an_image(128, 64)
    apart_ = {**QUICK, "steps": 1, "height": 64, "window": 64, "window_stride": 64, "output": "latents"}
    noise = torch.randn(1, 4, 8, 16, generator=torch.Generator().manual_seed(0))
    both = pipe("cat", controls=[network(image)], latents=noise, **apart_)
    halves = [
        pipe("cat", controls=[network(image.crop(box))], latents=part, **apart_)
        for box, part in zip([(0, 0, 64, 64), (64, 0, 128, 64)], noise.split(8, dim=-1), strict=True)
    ]
    inner = (
        (both - torch.cat(halves, dim=-1))[..., [0, 1, 2, 3, 12, 13, 14, 15]].abs().max()
    )  # where hints read the same
    plain = pipe("cat", latents=noise, **apart_)
    assert inner < 0.2 * (both - plain).abs().max()


@pytest.mark.parametrize("family", ["sd1", "inpaint"])
def test_inpainting_in_windows_keeps_the_rest(family):
    from latentdiff import inpaint
    from tests.tasks.images import mask

    image = an_image(112, 64)
    (found,) = inpaint(shared(family), image, mask((70, 8, 100, 50), 112, 64), "cat", window=64, vae_tile=64, **QUICK)
    assert apart(found.crop((0, 0, 64, 64)), image.crop((0, 0, 64, 64))) == 0
    assert apart(found, image) > 1


def test_the_recipe_makes_it_again():
    (found,) = shared("sd1")("cat", vae_tile=64, **WIDE)
    recipe = read_recipe(found.info)
    assert (recipe.window, recipe.window_stride, recipe.vae_tile) == (64, 16, 64)
    sampling = {**recipe.sampling(), **recipe.generating()}
    (again,) = shared("sd1")(recipe.prompt, width=recipe.width, height=recipe.height, progress=False, **sampling)
    assert apart(found, again) == 0
    assert "Window: 64" in recipe.to_parameters()
    (edited,) = image_to_image(shared("sd1"), an_image(112, 64), "cat", window=64, vae_tile=64, **QUICK)
    assert read_recipe(edited.info).vae_tile == 64


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 60}, "a window that is a multiple of 8, found 60"),
        ({"window": 64, "window_stride": 12}, "a window_stride that is a multiple of 8"),
        ({"window": 64, "window_stride": 72}, "a window_stride of at most the window, 64, found 72"),
        ({"window_stride": 8}, "expected window, how large, with window_stride"),
        ({"window": 64, "cache_interval": 2}, "leave cache_interval at 1"),
        ({"window": 0}, "window to be a whole number of 1 or more"),
        ({"vae_tile": 8}, "vae_tile to be a whole number of 32 or more"),
        ({"vae_tile": 64, "seamless": "x"}, "leave vae_tile out"),
    ],
)
def test_bad_values(options, message):
    with pytest.raises(UsageError, match=message) as error:
        shared("sd1")("cat", **QUICK, **options)
    assert "\n" not in str(error.value)
