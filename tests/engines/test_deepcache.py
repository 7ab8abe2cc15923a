"""DeepCache against the U-Net that computes everything."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from latentdiff.diffusion.guidance import Guidance
from latentdiff.engines.deepcache import CacheSettings, DeepCache
from latentdiff.errors import UsageError
from latentdiff.networks.taps import Tap
from latentdiff.networks.unet import UNet
from latentdiff.recipe import read_recipe
from latentdiff.tasks.restoration.operators import Denoise
from latentdiff.tasks.restoration.task import restore
from tests import peers
from tests.networks.test_unet import build

STEPS = 6
BRANCHES = {"sd1": 12, "small": 4}  # decoder blocks
ALL_BRANCHES = [(variant, branch) for variant, count in BRANCHES.items() for branch in range(count)]


@pytest.fixture(scope="module", params=list(BRANCHES))
def unet(request) -> UNet:
    return build(request.param)[1]


@pytest.fixture(scope="module")
def unets() -> dict[str, UNet]:
    return {variant: build(variant)[1] for variant in BRANCHES}


def latents(unet: UNet, seed: int = 0, count: int = 2, size: tuple[int, int] = (16, 16)) -> Tensor:
    return torch.randn(count, unet.config.in_channels, *size, generator=torch.Generator().manual_seed(seed))


def text(unet: UNet, seed: int = 9, count: int = 2) -> Tensor:
    return torch.randn(count, 7, unet.config.cross_attention_dim, generator=torch.Generator().manual_seed(seed))


class Counting:
    """A network that counts how often it computes all."""

    def __init__(self, unet: UNet) -> None:
        self.unet, self.calls = unet, 0

    def __call__(self, *arguments) -> Tensor:
        self.calls += 1
        return self.unet(*arguments)


# What is computed


@pytest.mark.parametrize(("variant", "branch"), ALL_BRANCHES)
@pytest.mark.parametrize("size", [(16, 16), (10, 7)])
@torch.no_grad()
def test_a_step_between_is_exact_where_nothing_changed(unets, variant: str, branch: int, size: tuple[int, int]) -> None:
    """The same latents, timestep and text have the same deep layers."""
    unet = unets[variant]
    network, context, x = Counting(unet), text(unet), latents(unet, size=size)
    cached = DeepCache(network, unet, CacheSettings(2, branch), STEPS)
    expected = unet(x, 500.0, context)
    assert torch.equal(cached(x, 500.0, context), expected)
    torch.testing.assert_close(cached(x, 500.0, context), expected, rtol=1e-5, atol=1e-5)
    assert network.calls == 1


@torch.no_grad()
def test_full_steps_are_those_of_the_network(unet: UNet) -> None:
    context, differ = text(unet), 0
    cached = DeepCache(unet, unet, CacheSettings(3), STEPS)
    for index in range(STEPS):
        x, t = latents(unet, index), 900.0 - 100 * index
        found, expected = cached(x, t, context), unet(x, t, context)
        if index % 3 == 0:
            assert torch.equal(found, expected)
        else:
            assert torch.isfinite(found).all()
            differ += not torch.allclose(found, expected, rtol=1e-3)
    assert differ == STEPS * 2 // 3  # random latents have nothing in common


@pytest.mark.parametrize("interval", [2, 3, 6])
@torch.no_grad()
def test_a_constant_deep_branch_is_cached_exactly(unet: UNet, interval: int) -> None:
    last = f"up_blocks.{len(unet.up_blocks) - 1}.resnets.{len(unet.up_blocks[-1].resnets) - 2}"
    deep = last.replace("resnets", "attentions") if hasattr(unet.up_blocks[-1], "attentions") else last
    cached, context = DeepCache(unet, unet, CacheSettings(interval), STEPS), text(unet)
    with Tap(unet, [deep], output=lambda name, arguments, output: torch.full_like(output, 0.7)):
        for index in range(STEPS):
            x, t = latents(unet, index), 900.0 - 100 * index
            torch.testing.assert_close(cached(x, t, context), unet(x, t, context), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_the_first_step_is_full_and_each_walk_begins_anew(unet: UNet) -> None:
    context = text(unet)
    for seed in range(2):
        x = latents(unet, seed)
        cached = DeepCache(unet, unet, CacheSettings(100), STEPS)
        assert torch.equal(cached(x, 900.0, context), unet(x, 900.0, context))


@torch.no_grad()
def test_another_text_makes_a_full_step(unet: UNet) -> None:
    """So it is where guidance begins or ends: the batch doubles or halves."""
    network, one, both = Counting(unet), text(unet), text(unet, 3, 4)
    cached = DeepCache(network, unet, CacheSettings(100), STEPS)
    full = []
    for index, context in enumerate([one, one, both, both, one, one]):
        x = latents(unet, index, len(context))
        before = network.calls
        found = cached(x, 500.0 - index, context)
        full.append(network.calls - before)
        if full[-1]:
            assert torch.equal(found, unet(x, 500.0 - index, context))
    assert full == [1, 0, 1, 0, 1, 0]


@torch.no_grad()
def test_nothing_is_left_on_the_network(unet: UNet) -> None:
    cached = DeepCache(unet, unet, CacheSettings(2), STEPS)
    for _ in range(2):
        cached(latents(unet), 500.0, text(unet))
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in unet.modules())


@torch.no_grad()
def test_a_back_end_with_modules_of_its_own_is_refused(unet: UNet) -> None:
    cached = DeepCache(lambda x, t, context: x, unet, CacheSettings(2), STEPS)
    with pytest.raises(UsageError, match="a back end that runs the U-Net's own modules"):
        cached(latents(unet), 500.0, text(unet))


# How much is computed


def in_branch(unet: UNet, branch: int) -> list[str]:
    """Names of the modules that a step between runs."""
    encoder = [
        [f"down_blocks.{level}.{kind}.{index}" for kind in ("resnets", "attentions")]
        if index < unet.config.layers_per_block
        else [f"down_blocks.{level}.downsamplers.0"]
        for level in range(len(unet.down_blocks))
        for index in range(unet.config.layers_per_block + 1)
    ]
    decoder = [
        [f"up_blocks.{level}.{kind}.{index}" for kind in ("resnets", "attentions")]
        + ([f"up_blocks.{level}.upsamplers.0"] if index == unet.config.layers_per_block else [])
        for level in range(len(unet.up_blocks))
        for index in range(unet.config.layers_per_block + 1)
    ]
    parts = [["conv_in", "time_embedding", "conv_out"], *encoder[:branch], *decoder[len(decoder) - 1 - branch :]]
    return [name for part in parts for name in part]


@pytest.mark.parametrize(("variant", "branch"), ALL_BRANCHES)
@torch.no_grad()
def test_multiplications_are_as_predicted(unets, variant: str, branch: int) -> None:
    unet = unets[variant]
    context, x = text(unet), latents(unet)
    with FlopCounterMode(display=False) as whole:
        unet(x, 500.0, context)
    of_modules = {name: sum(counts.values()) for name, counts in whole.get_flop_counts().items()}
    predicted = sum(of_modules.get(f"UNet.{name}", 0) for name in in_branch(unet, branch))
    cached = DeepCache(unet, unet, CacheSettings(3, branch), STEPS)
    with FlopCounterMode(display=False) as counter:
        for _ in range(STEPS):
            cached(x, 500.0, context)
    full = whole.get_total_flops()
    assert counter.get_total_flops() == STEPS // 3 * (full + 2 * predicted)
    assert 0 < predicted < full


@given(st.integers(1, 100), st.integers(2, 12))
def test_evenly_spread_full_steps(steps: int, interval: int) -> None:
    assert CacheSettings(interval).full_steps(steps) == {i for i in range(steps) if i % interval == 0}


@given(st.integers(2, 100), st.integers(1, 12), st.data())
def test_full_steps_around_a_centre(steps: int, interval: int, data: st.DataObject) -> None:
    full = CacheSettings(interval, centre=data.draw(st.integers(0, steps - 1))).full_steps(steps)
    assert 0 in full and full <= set(range(steps))
    assert len(full) <= -(-steps // interval)
    assert interval > 1 or len(full) == steps


def test_full_steps_lie_densest_around_the_centre() -> None:
    full = sorted(CacheSettings(3, centre=15).full_steps(50))
    assert len(full) == 17
    gaps = [b - a for a, b in pairwise(full)]
    near = min(range(len(gaps)), key=lambda i: abs(full[i] - 15))
    assert max(gaps[near - 1 : near + 2]) <= 2 < gaps[-1]
    assert gaps[-1] == max(gaps)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"interval": 0}, "cache interval of 1 .* found 0"),
        ({"interval": 2, "branch": -1}, "cache branch of 0 or more, found -1"),
        ({"interval": 2, "centre": -1}, "cache centre of step 0 or later, found -1"),
    ],
)
def test_settings_outside_their_domain_are_refused(values: dict[str, int], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        CacheSettings(**values)


def test_settings_that_do_not_fit_the_walk_are_refused(unet: UNet) -> None:
    count = sum(len(level.resnets) for level in unet.up_blocks)
    with pytest.raises(UsageError, match=f"cache branch of 0 to {count - 1} for this U-Net, found {count}"):
        DeepCache(unet, unet, CacheSettings(2, count), STEPS)
    with pytest.raises(UsageError, match="cache centre below the 6 steps, found 6"):
        DeepCache(unet, unet, CacheSettings(2, 0, 6), STEPS)


# In the pipeline

OPTIONS = {"steps": 6, "seed": 3, "num_images": 2, "spacing": "trailing", "progress": False}


@pytest.fixture(scope="module")
def pipe():
    return peers.ours("sd1")


def test_interval_one_is_bit_for_bit_no_caching(pipe) -> None:
    plain = pipe("cat", output="latents", **OPTIONS)
    assert torch.equal(pipe("cat", cache_interval=1, cache_branch=3, output="latents", **OPTIONS), plain)
    assert not torch.equal(pipe("cat", cache_interval=2, output="latents", **OPTIONS), plain)
    assert torch.equal(pipe("cat", output="latents", **OPTIONS), plain)


@torch.no_grad()
def test_texts_of_unequal_length_are_cached_apart(unet: UNet) -> None:
    """Two calls a step, one for each length; every second step computes both in full."""
    network, short, long = Counting(unet), text(unet), text(unet, 3, 4)
    cached = DeepCache(network, unet, CacheSettings(2), STEPS)
    calls = []
    for index in range(4):
        before = network.calls
        for context in (short, long):
            cached(latents(unet, index, len(context)), 500.0 - index, context)
        calls.append(network.calls - before)
    assert calls == [2, 0, 2, 0]


@pytest.mark.parametrize(("interval", "expected"), [(None, 2), (2, 3), (3, 2)])
def test_full_evaluations_of_a_run_are_counted(pipe, interval, expected) -> None:
    """Each of the two batches computes so many full steps; guidance over a part of the walk adds one where it ends."""
    network = Counting(pipe.unet)
    pipe.network = network
    try:
        options = {**OPTIONS, "batch_size": 1, "cache_interval": 3 if interval is None else interval}
        pipe("cat", guidance_interval=(1.2, 100.0) if interval is None else None, output="latents", **options)
    finally:
        pipe.network = pipe.unet
    levels = [level.sigma_hat > 1.2 for level in pipe.schedule.levels(6, "trailing")[:-1]]
    switches = [i for i in range(1, 6) if levels[i] != levels[i - 1]]
    extra = sum(i % 3 != 0 for i in switches) if interval is None else 0
    assert extra or interval is not None
    assert network.calls == 2 * (expected + extra)


def test_the_recipe_makes_the_cached_image_again(pipe) -> None:
    options = {**OPTIONS, "cache_interval": 2, "cache_branch": 1, "cache_centre": 2}
    image = pipe("cat", **options)[0]
    recipe = read_recipe(image.info)
    assert (recipe.cache_interval, recipe.cache_branch, recipe.cache_centre) == (2, 1, 2)
    again = pipe(
        recipe.prompt, width=recipe.width, height=recipe.height, progress=False, num_images=2, **recipe.sampling()
    )
    assert again[0].tobytes() == image.tobytes()


def test_a_cached_image_does_not_depend_on_its_batch(pipe) -> None:
    options = {**OPTIONS, "cache_interval": 3, "output": "latents"}
    together, alone = (pipe("cat", batch_size=size, **options) for size in (2, 1))
    torch.testing.assert_close(together, alone, rtol=1e-3, atol=1e-4)


def test_denoisers_of_other_tasks_compute_all(pipe) -> None:
    """Inversion, features and gradients ask for their denoiser without a cache, and restoring takes none."""
    network = Counting(pipe.unet)
    pipe.network = network
    try:
        levels = pipe.schedule.levels(6, "trailing")
        denoiser = pipe.denoiser(*pipe.encode(["cat", ""]).chunk(2), Guidance(scale=3.0), levels)
        with torch.no_grad():
            for level in levels[:-1]:
                denoiser(torch.zeros(1, 4, 8, 8), level)
    finally:
        pipe.network = pipe.unet
    assert network.calls == 6
    with pytest.raises(UsageError, match="takes no option 'cache_interval'"):
        restore(pipe, Image.new("RGB", (64, 64)), Denoise(noise_std=0.1), cache_interval=2)
