"""Random numbers of training as a pure function of (seed, purpose, step, row).

A row is the position of a sample in the global batch of a step. Nothing is drawn from a stream that has a state, so that a
resumed run needs no random states, and a batch split over processes or micro-batches gets the same numbers as the whole one.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache

import torch
from torch import Tensor

# Rows are drawn in blocks of this many: one generator per row would be slow, one per global batch wasteful on many processes.
_BLOCK = 32


def generator(*key: int | str) -> torch.Generator:
    """A CPU generator whose stream depends on `key` alone."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


def normal(key: tuple[int | str, ...], rows: range, shape: tuple[int, ...]) -> Tensor:
    """Standard normal numbers of the given rows, (len(rows), *shape), float32."""
    return _blocks(torch.randn, key, rows, shape)


def uniform(key: tuple[int | str, ...], rows: range, shape: tuple[int, ...] = ()) -> Tensor:
    """Numbers uniform on [0, 1) of the given rows, (len(rows), *shape), float32."""
    return _blocks(torch.rand, key, rows, shape)


def _blocks(draw, key: tuple[int | str, ...], rows: range, shape: tuple[int, ...]) -> Tensor:
    first, last = rows.start // _BLOCK, -(-rows.stop // _BLOCK)
    drawn = torch.cat([draw((_BLOCK, *shape), generator=generator(*key, block)) for block in range(first, last)])
    return drawn[rows.start - first * _BLOCK : rows.stop - first * _BLOCK]


class SampleOrder:
    """Endless shuffled order of `size` samples: every epoch is a permutation that depends on (seed, epoch) alone."""

    def __init__(self, size: int, seed: int) -> None:
        self.size = size
        # Bound to the instance, so that prefetching threads share the two permutations that a batch can touch.
        self._permutation = lru_cache(maxsize=2)(lambda epoch: torch.randperm(size, generator=generator(seed, "order", epoch)))

    def indices(self, first: int, count: int) -> Tensor:
        """Data set indices of the samples number `first` to `first + count` since the start of training, (count,) int64."""
        numbers = torch.arange(first, first + count)
        epochs = numbers // self.size
        parts = [self._permutation(int(epoch))[numbers[epochs == epoch] % self.size] for epoch in epochs.unique()]
        return torch.cat(parts)
