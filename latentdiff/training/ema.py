"""Exponential moving average of weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import Parameter

from latentdiff.training.sections import StageSection
from latentdiff.training.sharding import is_split, own_part


class EMA:
    """Averaged copies of parameters, in float32 on their device, to which these may be moved later.

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
                parameter.data, self.average[name] = self.average[name].to(parameter.device), parameter.data
                continue
            part = own_part(parameter)  # at a fixed place in memory
            before = part.clone()
            part.copy_(self.average[name])
            self.average[name] = before

    def load(self, average: Mapping[str, Tensor]) -> None:
        """Restore saved averages; names and shapes must be those of the parameters."""
        for name, tensor in self.average.items():
            tensor.copy_(average[name])


class ScheduleFreeAverage(EMA):
    """The averages that schedule-free AdamW keeps by itself, for which an `EMA` is taken otherwise.

    Its gradients are taken at y = (1 - beta1) z + beta1 x, which the live parameters are; z is in its state, and the average
    x is what is to be used (Defazio et al. 2024, "The Road Less Scheduled", equations 8 to 10). The library's own `eval` and
    `train` turn one into the other and back, which costs a rounding each time, so that a run that measures more often
    would learn something else. Here y stays untouched and x is made beside it.

    Args:
        parameters: the live ones, by name.
        optimizer: trains them, in its training mode.
    """

    def __init__(self, parameters: Mapping[str, Parameter], optimizer: torch.optim.Optimizer) -> None:
        super().__init__({}, 0.0)
        self._live, self._optimizer = dict(parameters), optimizer
        self._made: dict[str, Tensor] = {}

    @property
    def average(self) -> dict[str, Tensor]:
        """x by name, of the newest step, or as it was loaded."""
        if not self._made:
            self._made = self._averages()
        return self._made

    @average.setter
    def average(self, value: dict[str, Tensor]) -> None:
        self._made = value

    def update(self, step: int) -> None:
        self._made = {}

    @torch.no_grad()
    def _averages(self) -> dict[str, Tensor]:
        share = {
            parameter: 1 - 1 / group["betas"][0]
            for group in self._optimizer.param_groups
            for parameter in group["params"]
        }
        return {
            name: y.detach().lerp(self._optimizer.state.get(y, {}).get("z", y.detach()), share[y])
            for name, y in self._live.items()
        }


def make_average(parameters: Mapping[str, Parameter], settings: StageSection, optimizer: torch.optim.Optimizer) -> EMA:
    """The averages that `settings` ask for of parameters that `optimizer` trains."""
    if settings.optimizer == "schedulefree":
        return ScheduleFreeAverage(parameters, optimizer)
    return EMA(parameters, settings.ema_decay, settings.ema_every)
