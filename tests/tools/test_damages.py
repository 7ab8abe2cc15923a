"""The damages by which the judge learns what is melted."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from tests.scenes import FEW

import damages  # isort: skip  (found by tests.scenes)

APPLE = FEW.sprite("apple", None, 88)
LAYERS = damages.layers_of(APPLE)


def changed(damage, severity, seed=0):
    return damages.change(LAYERS, damage(LAYERS, severity, np.random.default_rng(seed)))


def test_layers_are_the_sprite():
    again = damages.sprite_of(LAYERS, APPLE)
    assert np.allclose(again.colour, APPLE.colour, atol=1e-3) and np.allclose(again.keep, APPLE.keep, atol=1e-5)
    assert damages.side_of(LAYERS) == pytest.approx(84, abs=4)  # a cell of 88 pixels with a margin of two on each side


@pytest.mark.parametrize("name", damages.GRADED)
def test_more_severity_is_more_damage(name):
    shares = [np.mean([changed(damages.GRADED[name], severity, seed) for seed in range(6)]) for severity in (0, 0.3, 1)]
    assert shares[0] < 0.01 and shares[0] <= shares[1] < 0.6 * shares[2]


@pytest.mark.parametrize("name", [*damages.GRADED, *damages.UNGRADED])
def test_colours_stay_within_what_is_covered(name):
    damage = (damages.GRADED | damages.UNGRADED)[name]
    sprite = damages.sprite_of(damage(LAYERS, 1.0, np.random.default_rng(1)), APPLE)
    assert sprite.colour.shape == APPLE.colour.shape and sprite.keep.shape == APPLE.keep.shape
    assert sprite.keep.min() >= 0 and sprite.keep.max() <= 1 and sprite.colour.min() >= 0
    assert (sprite.colour <= 255 * (1 - sprite.keep) + 1e-3).all()


def test_blur_is_scipys():
    radius = 0.10 * 0.5 * damages.side_of(LAYERS)
    expected = gaussian_filter(LAYERS, (radius, radius, 0), mode="constant", truncate=8)
    found = damages.blurred(LAYERS, 0.5, np.random.default_rng(0))
    assert np.abs(found - expected).max() < 0.01


def test_erased_parts_are_as_large_as_said():
    left = [damages.erased(LAYERS, 1.0, np.random.default_rng(seed))[..., 3].sum() for seed in range(12)]
    assert np.mean(left) / LAYERS[..., 3].sum() == pytest.approx(0.4, abs=0.08)


def test_two_things_in_one_have_something_of_both():
    other = damages.layers_of(FEW.sprite("rocket", None, 88))
    for seed in range(12):
        both = damages.mixed(LAYERS, other, np.random.default_rng(seed))
        assert damages.change(LAYERS, both) > 0.1 and damages.change(other, both) > 0.1


def test_harmless_damage_is_less_than_any_melting():
    def most(melted):
        return [
            damages.change(LAYERS, damages.damaged(LAYERS, melted, np.random.default_rng(seed))) for seed in range(40)
        ]

    assert np.median(most(False)) < 0.5 * np.median(most(True))
