"""Exponential moving average of weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import Parameter

from latentdiff.training.sharding import is_split, own_part


class EMA:
    """Averaged copies of parameters, in float32 on their device.

    Args:
        parameters: the live ones, by name.
        decay: share of the old average that one step keeps; 0 keeps no averages, and what is said of them holds for the
            live weights.
        every: steps between updates; one update then keeps `decay ** every`.
    """

    def __init__(self, parameters: Mapping[str, Parameter], decay: float, every: int = 1) -> None:
        self._live = dict(parameters) if decay else {}
        self._decay, self._every = decay, every
        # Of parameters that are split over processes, this process's part.
        self.average = {name: own_part(parameter.detach()).clone() for name, parameter in self._live.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after step 0, 1, ...; does nothing between updates.

        Early averages forget faster, as if over the last tenth of the steps: decay min(decay, (1 + n) / (10 + n)).
        """
        done = step + 1
        if done % self._every or not self._live:
            return
        keep = min(self._decay, (1 + done) / (10 + done)) ** self._every
        torch._foreach_lerp_(list(self.average.values()), [own_part(p.detach()) for p in self._live.values()], 1 - keep)

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Inside, the live parameters hold the averages."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for name, parameter in self._live.items():
            if not is_split(parameter):
                parameter.data, self.average[name] = self.average[name], parameter.data
                continue
            part = own_part(parameter)  # at a fixed place in memory
            before = part.clone()
            part.copy_(self.average[name])
            self.average[name] = before

    def load(self, average: Mapping[str, Tensor]) -> None:
        """Restore saved averages; names and shapes must be those of the parameters."""
        for name, tensor in self.average.items():
            tensor.copy_(average[name])
