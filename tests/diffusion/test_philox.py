"""The noise of an NVIDIA GPU, against published numbers."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from latentdiff.diffusion.philox import normal, philox

ONES = 0xFFFFFFFF


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ONES,) * 4, (ONES, ONES), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_words_are_those_of_random123(
    counter: tuple[int, ...], key: tuple[int, int], expected: tuple[int, ...]
) -> None:
    """The known answers that come with the authors' library (kat_vectors, philox4x32 10)."""
    assert tuple(philox(np.array(counter, np.uint32)[:, None], key)[:, 0]) == expected


def test_numbers_are_those_of_a_gpu() -> None:
    """`torch.manual_seed(0); torch.randn(3, 4, device="cuda")`, as AUTOMATIC1111's rng_philox.py documents it."""
    published = [
        [-0.92466259, -0.42534415, -2.6438457, 0.14518388],
        [-0.12086647, -0.57972564, -0.62285122, -0.32838709],
        [-1.07454231, -0.36314407, -1.67105067, 2.26550497],
    ]
    np.testing.assert_allclose(normal(0, 0, 12).reshape(3, 4), published, atol=4e-7)


def test_a_part_of_a_tensor_is_the_same_alone() -> None:
    np.testing.assert_array_equal(normal(3, 2, 100)[40:], normal(3, 2, 60, first=40))


def test_high_words_of_a_seed_count_and_calls_differ() -> None:
    assert not np.array_equal(normal(1, 0, 8), normal(1 + 2**32, 0, 8))
    assert not np.array_equal(normal(1, 0, 8), normal(1, 1, 8))


def test_numbers_are_normal() -> None:
    assert stats.kstest(normal(2**64 - 1, 7, 20_000), "norm").pvalue > 0.01
