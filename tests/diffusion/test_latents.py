"""The noise of an image depends on its seed and on nothing else."""

from __future__ import annotations

import pytest
import torch
from diffusers.utils.torch_utils import randn_tensor
from hypothesis import given
from hypothesis import strategies as st

from latentdiff.diffusion.latents import SOURCES, NoiseRule, NoiseStream, start_noise
from latentdiff.diffusion.philox import normal
from latentdiff.errors import UsageError

SHAPE = (4, 6, 5)


@given(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=8))
def test_every_image_has_the_noise_of_its_seed_alone(seeds: list[int]) -> None:
    stream, alone = NoiseStream(seeds, SHAPE), [NoiseStream([seed], SHAPE) for seed in seeds]
    for _ in range(3):
        assert torch.equal(stream(), torch.cat([one() for one in alone]))


def test_draws_differ_from_one_another_and_between_seeds() -> None:
    stream = NoiseStream([0, 1], SHAPE)
    first, second = stream(), stream()
    assert first.shape == (2, *SHAPE) and first.dtype == torch.float32
    assert not torch.equal(first, second)
    assert not torch.equal(first[0], first[1])


def test_noise_is_that_of_diffusers_with_the_same_generators() -> None:
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    stream = NoiseStream([3, 4], SHAPE)
    for _ in range(2):
        assert torch.equal(stream(), randn_tensor((2, *SHAPE), generator=generators))


def test_noise_is_drawn_in_float32_whatever_is_asked_for() -> None:
    single, double, half = (
        NoiseStream([7], SHAPE, dtype=dtype)() for dtype in (torch.float32, torch.float64, torch.bfloat16)
    )
    assert torch.equal(double, single.double())
    assert torch.equal(half, single.bfloat16())


def test_start_noise_is_the_first_draw() -> None:
    assert torch.equal(start_noise([5, 6], SHAPE), NoiseStream([5, 6], SHAPE)())


def test_drawing_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    start_noise([0], SHAPE)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("seeds", "found"), [([], "found none"), ([1, -1], "found -1"), ([2**64], f"found {2**64}")])
def test_impossible_seeds_are_refused(seeds: list[int], found: str) -> None:
    with pytest.raises(UsageError, match=found):
        NoiseStream(seeds, SHAPE)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("delta", [0, 31337])
def test_every_source_draws_an_image_as_it_would_alone(source: str, delta: int) -> None:
    rule = NoiseRule(source, delta=delta)
    batch, alone = NoiseStream([5, 6], SHAPE, rule=rule), NoiseStream([6], SHAPE, rule=rule)
    for _ in range(3):
        assert torch.equal(batch()[1:], alone())


@pytest.mark.parametrize(("source", "first_of"), [("cpu", "cpu"), ("nv", "nv"), ("comfy", "cpu")])
def test_a_seed_delta_changes_all_draws_but_the_first(source: str, first_of: str) -> None:
    """A1111's "eta noise seed delta": a new generator with the seed and the delta, after the first draw."""
    stream = NoiseStream([5], SHAPE, rule=NoiseRule(source, delta=2))
    assert torch.equal(stream(), start_noise([5], SHAPE, rule=NoiseRule(first_of)))
    again = NoiseStream([7], SHAPE, rule=NoiseRule("nv" if source == "comfy" else source))
    for _ in range(2):
        assert torch.equal(stream(), again())


def test_comfy_draws_a_batch_from_one_generator_on_the_cpu_and_then_on_the_gpu() -> None:
    """Its own code, in torch: the whole batch at once from `torch.manual_seed`; later noise from a GPU's generator."""
    shape = (4, 8, 8)  # in multiples of 16 numbers, where torch draws a batch as its images one by one
    whole = torch.randn((3, *shape), generator=torch.Generator().manual_seed(9))
    later = torch.from_numpy(normal(9, 1, whole.numel())).view_as(whole)
    for index in range(3):
        stream = NoiseStream([9], shape, rule=NoiseRule("comfy", index=index))
        assert torch.equal(stream()[0], whole[index])
        stream()
        assert torch.equal(stream()[0], later[index])
