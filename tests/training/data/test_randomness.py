import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from latentdiff.training.data.randomness import SampleOrder, generator, normal, torch_seed, uniform

KEY = (0, "noise", 7)


@given(first=st.integers(0, 100), count=st.integers(1, 80))
def test_rows_are_the_same_in_any_slice(first, count):
    whole = normal(KEY, range(200), (3,))
    assert np.array_equal(normal(KEY, range(first, first + count), (3,)), whole[first : first + count])


@pytest.mark.parametrize("other", [(1, "noise", 7), (0, "posterior", 7), (0, "noise", 8)])
def test_keys_give_unrelated_numbers(other):
    correlation = np.corrcoef(normal(KEY, range(4000), ()), normal(other, range(4000), ()))[0, 1]
    assert abs(correlation) < 0.08
    assert torch_seed(*KEY) != torch_seed(*other)


def test_distributions():
    drawn = normal(KEY, range(20_000), ())
    assert drawn.dtype == np.float32
    assert abs(drawn.mean()) < 0.03 and abs(drawn.std() - 1) < 0.03
    even = uniform(KEY, range(20_000))
    assert even.min() >= 0 and even.max() < 1 and abs(even.mean() - 0.5) < 0.01


def test_rows_differ_within_and_across_blocks():
    assert len(np.unique(uniform(KEY, range(500)))) == 500


@given(size=st.integers(1, 40), batch=st.integers(1, 50), seed=st.integers(0, 3))
def test_every_epoch_visits_every_sample_once(size, batch, seed):
    order = SampleOrder(size, seed)
    batches = [order.indices(number * batch, batch) for number in range(-(-3 * size // batch))]
    epochs = np.concatenate(batches)[: 3 * size].reshape(3, size)
    assert all(sorted(epoch) == list(range(size)) for epoch in epochs.tolist())


def test_order_depends_on_epoch_and_seed():
    order = SampleOrder(50, 0)
    first, second = order.indices(0, 50), order.indices(50, 50)
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, SampleOrder(50, 1).indices(0, 50))
    assert np.array_equal(first, SampleOrder(50, 0).indices(0, 50))


def test_generator_is_a_function_of_its_key():
    assert generator("a", 1).random() == generator("a", 1).random() != generator("a", 2).random()
