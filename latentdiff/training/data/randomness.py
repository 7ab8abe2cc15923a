"""Random numbers of training as a pure function of (seed, purpose, step, row).

A row is the position of a sample in the global batch of a step. Nothing is drawn from a stream that has a state, so
that a resumed run needs no random states, and a batch split over processes or micro-batches gets the same numbers as
the whole one.

All of it is numpy, not torch: it runs in background threads, where torch would start a second team of worker threads
that fights with the one of the training step for the cores.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np

Key = tuple[int | str, ...]

# Rows are drawn in blocks of this many: one generator per row would be slow, one per global batch wasteful on many
# processes.
_BLOCK = 32


def generator(*key: int | str) -> np.random.Generator:
    """A generator whose stream depends on `key` alone (Philox, counter-based: Salmon et al. 2011)."""
    return np.random.Generator(np.random.Philox(key=_hash(key)))


def torch_seed(*key: int | str) -> int:
    """A seed for torch that depends on `key` alone."""
    return _hash(key) % 2**63


def normal(key: Key, rows: range, shape: tuple[int, ...]) -> np.ndarray:
    """Standard normal numbers of the given rows, (len(rows), *shape), float32."""
    return _rows(lambda block, size: block.standard_normal(size, dtype=np.float32), key, rows, shape)


def uniform(key: Key, rows: range, shape: tuple[int, ...] = ()) -> np.ndarray:
    """Numbers uniform on [0, 1) of the given rows, (len(rows), *shape), float64."""
    return _rows(lambda block, size: block.random(size), key, rows, shape)


def _rows(
    draw: Callable[[np.random.Generator, tuple[int, ...]], np.ndarray], key: Key, rows: range, shape: tuple[int, ...]
) -> np.ndarray:
    first, last = rows.start // _BLOCK, -(-rows.stop // _BLOCK)
    drawn = np.concatenate([draw(generator(*key, block), (_BLOCK, *shape)) for block in range(first, last)])
    return drawn[rows.start - first * _BLOCK : rows.stop - first * _BLOCK]


def _hash(key: Key) -> int:
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=16).digest(), "little")


class SampleOrder:
    """Endless shuffled order of `size` samples: every epoch is a permutation that depends on (seed, epoch) alone."""

    def __init__(self, size: int, seed: int) -> None:
        self.size = size
        # Bound to the instance, so that prefetching threads share the two permutations that a batch can touch.
        self._permutation = lru_cache(maxsize=2)(lambda epoch: generator(seed, "order", epoch).permutation(size))

    def indices(self, first: int, count: int) -> np.ndarray:
        """Data set indices of the samples number `first` to `first + count` since the start of training, (count,)
        int64."""
        epochs, places = np.divmod(np.arange(first, first + count), self.size)
        return np.concatenate([self._permutation(int(epoch))[places[epochs == epoch]] for epoch in np.unique(epochs)])


class BatchOrder:
    """Which images of a data set stand in which batch, in a `SampleOrder` of epochs that show image i `repeats[i]` times."""

    def __init__(self, repeats: Sequence[int], batch_size: int, seed: int) -> None:
        self._seen, self._batch_size = np.repeat(np.arange(len(repeats)), repeats), batch_size
        self._order = SampleOrder(len(self._seen), seed)

    def batch(self, step: int, rows: range) -> np.ndarray:
        """Indices of the images in these rows of a step's batch, (len(rows),) int64."""
        return self._seen[self._order.indices(step * self._batch_size + rows.start, len(rows))]
