from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from latentdiff.errors import DataError
from latentdiff.training.validation import (
    BANDS,
    banded_losses,
    losses_entry,
    sample_prompts,
    split,
)

KEYS = [f"{index:04d}.png" for index in range(400)]
SHAPE = (4, 3, 3)


def names(keys, indices):
    return {keys[index] for index in indices}


def test_split_is_a_partition_of_about_the_share():
    parts = split(KEYS, 0.1, seed=3)
    assert sorted([*parts.training, *parts.held_out]) == list(range(len(KEYS)))
    assert 20 <= len(parts.held_out) <= 60
    assert len(parts.training_part) == len(parts.held_out)
    assert set(parts.training_part) <= set(parts.training)


def test_split_stays_when_images_are_added_and_reordered():
    before = split(KEYS, 0.1, seed=3)
    more = [f"new-{index}.jpg" for index in range(300)] + KEYS[::-1]
    after = split(more, 0.1, seed=3)
    assert names(KEYS, before.held_out) == names(more, after.held_out) & set(KEYS)


def test_split_depends_on_the_seed():
    assert names(KEYS, split(KEYS, 0.1, seed=3).held_out) != names(KEYS, split(KEYS, 0.1, seed=4).held_out)


def test_copies_of_an_image_stay_on_one_side():
    keys = [key for key in KEYS for _ in range(2)]
    parts = split(keys, 0.3, seed=0)
    assert not names(keys, parts.training) & names(keys, parts.held_out)


def test_a_few_images_still_hold_one_out():
    assert len(split(["a", "b", "c"], 0.001, seed=0).held_out) == 1
    assert len(split(["a", "b", "c"], 0.0, seed=0).held_out) == 0


def test_nothing_to_train_on_is_an_error():
    with pytest.raises(DataError, match="all 1 images would be held out"):
        split(["alone.png"], 0.1, seed=0)


def test_most_keeps_the_same_images_first():
    few, many = (split(KEYS, 0.2, seed=1, most=most) for most in (5, 10))
    assert list(many.held_out[:5]) == list(few.held_out)
    assert len(few.training_part) == 5
    assert not set(few.training) & set(split(KEYS, 0.2, seed=1).held_out)


def losses(images, errors_of, batch_size=16, keys=KEYS, shape_of=lambda _: SHAPE):
    return banded_losses(images, keys, shape_of, errors_of, num_train_timesteps=1000, seed=7, batch_size=batch_size)


def test_bands_hold_their_own_timesteps_evenly():
    seen = Counter()

    def errors_of(indices, noise, timesteps):
        assert noise.shape == (len(indices), 2, *SHAPE) and noise.dtype == np.float32
        seen.update((timesteps * BANDS // 1000).tolist())
        return torch.from_numpy(timesteps).float()

    result = losses(range(200), errors_of)
    assert seen == {band: 200 for band in range(BANDS)}
    np.testing.assert_allclose(result, [100, 300, 500, 700, 900], atol=12)


def test_the_draws_of_an_image_spread_over_each_band():
    seen = []

    def errors_of(indices, noise, timesteps):
        seen.extend(timesteps.tolist())
        return torch.zeros(len(indices))

    losses([0], errors_of)
    assert len(seen) == 16 * BANDS
    width = 1000 // BANDS
    for band in range(BANDS):
        places = sorted(t for t in seen if t // width == band)
        steps = np.diff([*places, places[0] + width])
        assert len(places) == 16 and steps.min() >= width // 16 and steps.max() <= width // 16 + 1


def test_the_noise_belongs_to_the_image():
    """The loss is the same however the images are batched and numbered, and at every call."""

    def errors_of(images_in_order):
        return lambda indices, noise, timesteps: torch.tensor(
            [
                float((number + 1) * row[1].mean() + t)
                for number, row, t in zip(images_in_order[indices], noise, timesteps, strict=True)
            ]
        )

    order = np.arange(len(KEYS))
    whole = losses(range(40), errors_of(order))
    np.testing.assert_allclose(losses(range(40), errors_of(order), batch_size=7), whole, rtol=1e-12)
    turned = [KEYS[index] for index in order[::-1]]
    places = [len(KEYS) - 1 - index for index in range(40)]
    np.testing.assert_allclose(losses(places, errors_of(order[::-1]), keys=turned), whole, rtol=1e-12)


def test_noise_is_standard_normal_and_differs_between_draws():
    drawn = []

    def errors_of(indices, noise, timesteps):
        drawn.extend(noise)
        return torch.zeros(len(indices))

    losses(range(2), errors_of)
    noise = np.stack(drawn[::BANDS])  # the bands of a draw share its noise
    distinct = {array.tobytes() for array in drawn}
    assert len(distinct) == 32  # 2 images x 16 draws
    assert abs(np.stack(drawn).mean()) < 0.1 and abs(np.stack(drawn).std() - 1) < 0.1
    assert noise.shape[1:] == (2, *SHAPE)


def test_images_of_different_shapes_never_share_a_call():
    shapes = {0: (4, 2, 3), 1: (4, 3, 2), 2: (4, 2, 3)}

    def errors_of(indices, noise, timesteps):
        assert {shapes[index] for index in indices.tolist()} == {noise.shape[2:]}
        return torch.from_numpy(indices).double()

    np.testing.assert_allclose(losses([0, 1, 2], errors_of, shape_of=shapes.get), 1.0)


def test_entry_names_bands_and_gap():
    entry = losses_entry(np.array([5.0, 4, 3, 2, 1]), np.array([4.0, 3, 2, 1, 0]), 1000)
    assert entry["val_mse"] == 3 and entry["train_mse"] == 2 and entry["gap"] == 1
    assert entry["val_0_199"] == 5 and entry["train_800_999"] == 0
    assert "gap" not in losses_entry(np.ones(BANDS), None, 1000)


def test_sample_prompts_stay_when_captions_are_added():
    captions = [f"a thing number {index}" for index in range(30)]
    chosen = sample_prompts(captions, 5, seed=0)
    assert len(set(chosen)) == 5
    assert sample_prompts(captions[::-1] + captions, 5, seed=0) == chosen
