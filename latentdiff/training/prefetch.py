"""Items made ahead of their use in background threads."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any


class Prefetch:
    """Make items ahead of their use in background threads, in order.

    `make` must be a pure function of its key; an error in it is raised where the item is used.
    """

    def __init__(self, make: Callable[[Any], Any], keys: Iterable[Any], *, depth: int = 4, workers: int = 2) -> None:
        self._make, self._keys = make, iter(keys)
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="prefetch")
        self._waiting: list[Future] = []
        self._depth = depth

    def __iter__(self) -> Iterator[Any]:
        try:
            self._submit()
            while self._waiting:
                item = self._waiting.pop(0).result()
                self._submit()
                yield item
        finally:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def _submit(self) -> None:
        while len(self._waiting) < self._depth and (key := next(self._keys, None)) is not None:
            self._waiting.append(self._pool.submit(self._make, key))
