import threading
import time

import pytest

from latentdiff.errors import DataError
from latentdiff.training.prefetch import Prefetch


def test_prefetch_keeps_the_order_and_works_ahead():
    made = []

    def make(key):
        time.sleep(0.01 * (3 - key % 3))
        made.append(key)
        return key * key

    items = iter(Prefetch(make, range(10), depth=3, workers=3))
    assert next(items) == 0
    time.sleep(0.2)
    assert 2 <= len(made) <= 4
    assert list(items) == [key * key for key in range(1, 10)]


def test_prefetch_raises_errors_where_the_item_is_used():
    def make(key):
        if key == 2:
            raise DataError("broken")
        return key

    items = iter(Prefetch(make, range(5)))
    assert [next(items), next(items)] == [0, 1]
    with pytest.raises(DataError, match="broken"):
        next(items)


def test_closing_prefetch_ends_its_threads():
    items = iter(Prefetch(lambda key: key, range(100)))
    next(items)
    items.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]
