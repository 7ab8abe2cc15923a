from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latentdiff.errors import DataError, UsageError
from latentdiff.training.data.buckets import BatchPlan, assign, bucket_sizes, kept_share

SIDES = st.integers(1, 3000)


def test_buckets_of_sd():
    buckets = bucket_sizes(512, 64)
    assert (512, 512) in buckets and (704, 320) not in buckets and (640, 384) in buckets
    assert {(height, width) for width, height in buckets} == set(buckets)
    assert all(width % 64 == height % 64 == 0 and width * height <= 512**2 for width, height in buckets)


@given(size=st.tuples(SIDES, SIDES), step=st.sampled_from([8, 64]))
def test_nothing_is_enlarged(size, step):
    (bucket,) = assign([size], 512, step)
    if bucket is None:
        assert min(size) < step
    else:
        assert bucket[0] <= size[0] and bucket[1] <= size[1]
        assert bucket[0] % step == bucket[1] % step == 0
        assert max(bucket) <= 2 * min(bucket) and bucket[0] * bucket[1] <= 512**2


@given(size=st.tuples(SIDES, SIDES))
def test_upscaling_when_asked(size):
    (bucket,) = assign([size], 512, 64, upscale=True)
    assert bucket in bucket_sizes(512, 64)


def test_extreme_sizes():
    assert assign([(1, 1), (20000, 100), (512, 512), (4000, 3000)], 512, 64) == [
        None,
        (128, 64),
        (512, 512),
        (576, 448),
    ]
    assert assign([(96, 96)], 96, 8) == [(96, 96)]
    assert kept_share((200, 100), (64, 64)) == 0.5 and kept_share((64, 64), (64, 64)) == 1


def test_wrong_settings():
    for options in ({"resolution": 100}, {"resolution": 0}, {"resolution": 512, "max_aspect": 0.5}):
        with pytest.raises(UsageError):
            assign([(512, 512)], **options)


PLANS = {
    "counts": st.lists(st.integers(1, 12), min_size=1, max_size=4),
    "batch": st.integers(1, 7),
    "seed": st.integers(0, 3),
}


def plan(counts, batch, seed, **options) -> BatchPlan:
    bucket_of = [(64 * (1 + number), 64) for number, count in enumerate(counts) for _ in range(count)]
    return BatchPlan(bucket_of, batch, seed, **options)


@settings(max_examples=40)
@given(**PLANS)
def test_every_image_is_seen_equally_often(counts, batch, seed):
    made = plan(counts, batch, seed)
    seen = Counter(int(index) for step in range(sum(counts) * 4) for index in made.indices(step)[1])
    # After `batch` epochs every bucket's images fill whole batches.
    assert seen == Counter({index: 4 * batch for index in range(sum(counts))})


@settings(max_examples=40)
@given(**PLANS)
def test_batches_are_whole_and_of_one_bucket(counts, batch, seed):
    made, fresh = plan(counts, batch, seed), plan(counts, batch, seed)
    bounds = np.cumsum([0, *counts])
    for step in reversed(range(12)):
        bucket, indices = made.indices(step)
        number = bucket[0] // 64 - 1
        assert len(indices) == batch
        assert ((indices >= bounds[number]) & (indices < bounds[number + 1])).all()
        assert np.array_equal(indices, fresh.indices(step)[1])


def test_order_depends_on_the_seed_and_the_epoch():
    def order(seed, first):
        return [index for step in range(first, first + 5) for index in plan([20], 4, seed).indices(step)[1]]

    assert sorted(order(0, 0)) == sorted(order(0, 5)) == list(range(20))
    assert order(0, 0) != order(1, 0) != order(1, 5)


def test_repeats_and_left_out():
    made = BatchPlan([(64, 64), None, (64, 64)], 3, 0, repeats=[2, 1, 1])
    assert made.samples_per_epoch == 3 and made.buckets == [(64, 64)]
    assert sorted(made.indices(0)[1]) == [0, 0, 2]


@given(**PLANS)
def test_epochs(counts, batch, seed):
    made = plan(counts, batch, seed)
    epochs = [made.epoch(step) for step in range(20)]
    assert epochs == sorted(epochs)
    assert abs(epochs[-1] - 19 * batch / sum(counts)) <= batch + 1


def test_nothing_large_enough():
    with pytest.raises(DataError, match="none of 2 images is large enough"):
        BatchPlan([None, None], 2, 0)
