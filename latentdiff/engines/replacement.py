"""When an engine may stand in for a module, and when it has to be made again."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from latentdiff.errors import UsageError
from latentdiff.networks.kernels import has_taps


def plain_steps_in(module: nn.Module, engine: str) -> bool:
    """Whether `module` has taps, which an engine made before cannot know of; says so."""
    if not has_taps(module):
        return False
    warnings.warn(
        f"a LoRA or another tap is on the {type(module).__name__}: torch computes it, not {engine}", stacklevel=3
    )
    return True


@contextmanager
def forms_in_force(forms: Mapping[nn.Module, Callable[..., Tensor]]) -> Iterator[None]:
    """Give modules other forwards inside the `with`; afterwards each has the one that it had."""
    before = {module: module.__dict__.get("forward") for module in forms}
    for module, form in forms.items():
        module.forward = form
    try:
        yield
    finally:
        for module, form in before.items():
            if form is None:
                del module.__dict__["forward"]
            else:
                module.forward = form


def refuse_gradients(engine: str, *inputs: Tensor) -> None:
    """Raise a UsageError where gradients are wanted, which only the plain modules give."""
    if torch.is_grad_enabled() and any(each.requires_grad for each in inputs):
        raise UsageError(
            f"{engine} gives no gradients, which this method needs; use --backend torch and another --precision"
        )


def state_of(module: nn.Module) -> Hashable:
    """A value that changes when the weights of `module` are written to, moved or converted."""
    first = next(module.parameters())
    return first.dtype, first.device, sum(parameter._version for parameter in module.parameters())
