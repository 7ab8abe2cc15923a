"""Dropout in adapters: noise that depends on seed, step, layer and row alone, so that a resumed run, a batch in parts and a
block that is computed again see the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from latentdiff.adapters.lora.kinds import Change, LoRALayer
from latentdiff.training.data.randomness import generator, torch_seed

_BITS = 32
_MASK = 2**_BITS - 1


@dataclass(frozen=True)
class _Batch:
    step: int
    rows: Tensor


class Dropout:
    """What is left out of the adapters' part, in training alone.

    Args:
        seed: of the run.
        inputs: share of the numbers of a layer's input that its adapter does not see; the others count more, so that the mean
            is the same (as PEFT's `lora_dropout`).
        ranks: share of the inner numbers of a LoRA that are left out, drawn for each sample; the others count more (as
            `rank_dropout` of kohya's scripts).
        layers: share of the layers whose adapter is left out, drawn for each step (as their `module_dropout`).
    """

    def __init__(self, seed: int, *, inputs: float = 0.0, ranks: float = 0.0, layers: float = 0.0) -> None:
        self._seed, self._inputs, self._ranks, self._layers = seed, inputs, ranks, layers
        self._batch: ContextVar[_Batch | None] = ContextVar("the batch that is trained on", default=None)

    @contextmanager
    def drawing(self, step: int, rows: Tensor) -> Iterator[None]:
        """Inside, something is left out. A context of Python's, so that a block that is computed again, perhaps on another
        thread, can be so in the same one.

        Args:
            rows: places of the samples in the batch of the step, (n,) int64.
        """
        token = self._batch.set(_Batch(step, rows))
        try:
            yield
        finally:
            self._batch.reset(token)

    def added(self, name: str, layer: Change, target: nn.Module, x: Tensor, strength: float) -> Tensor:
        """What the adapter `layer` of `target`, called `name`, adds to its output for the input x; see `LoRA.attached`."""
        if (batch := self._batch.get()) is None:
            return layer.added(target, x, strength)
        if generator(self._seed, "module dropout", batch.step, name).random() < self._layers:
            strength = 0.0  # all processes must still have gradients of all parameters
        if self._inputs:
            count = x.numel() // len(batch.rows)  # of all chunks of a caption
            x = x * self._kept(self._inputs, "dropout", name, batch, count).view_as(x).to(x)
        if not self._ranks:
            return layer.added(target, x, strength)
        assert isinstance(layer, LoRALayer)
        kept = self._kept(self._ranks, "rank dropout", name, batch, layer.rank)
        return layer(x, strength, kept.repeat_interleave(len(x) // len(kept), 0))

    def _kept(self, share: float, purpose: str, name: str, batch: _Batch, count: int) -> Tensor:
        """0 for so large a share of `count` numbers of each row, and more than 1 for the others, (n, count)."""
        drawn = random_bits(torch_seed(self._seed, purpose, batch.step, name), batch.rows, count)
        return (drawn >= round(share * 2**_BITS)) / (1 - share)


def random_bits(key: int, rows: Tensor, count: int) -> Tensor:
    """Uniform integers of 32 bits that depend on the key, the row and their place alone, (n, count) int64.

    They are hashes of counters, computed where the rows are: numbers for whole activations would take too long to bring
    there.
    """
    of_rows = _hash(_hash((rows ^ key) & _MASK) ^ (key >> _BITS))  # the key has 63 bits
    return _hash(_hash(torch.arange(count, device=rows.device)) ^ of_rows[:, None])


def _hash(x: Tensor) -> Tensor:
    """A permutation of the integers of 32 bits without visible order (Wellons 2018, "lowbias32")."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _MASK
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _MASK
    return x ^ (x >> 16)
