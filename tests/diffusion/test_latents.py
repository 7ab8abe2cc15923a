"""The noise of an image depends on its seed and on nothing else."""

from __future__ import annotations

import pytest
import torch
from diffusers.utils.torch_utils import randn_tensor
from hypothesis import given
from hypothesis import strategies as st

from latentdiff.diffusion.latents import NoiseStream, start_noise
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
