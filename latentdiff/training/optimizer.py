"""The optimizer, and its learning rate as a function of the step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import Parameter

from latentdiff.training.config import StageSection


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that share a learning rate and a gradient norm.

    Args:
        name: stands in the log.
        parameters: by name.
        lr_scale: factor on the stage's learning rate.
    """

    name: str
    parameters: dict[str, Parameter]
    lr_scale: float = 1.0


def make_optimizer(groups: list[ParameterGroup], settings: StageSection) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019), fused; biases and norms are not decayed."""
    param_groups = []
    for group in groups:
        parameters = list(group.parameters.values())
        matrices = [parameter for parameter in parameters if parameter.ndim > 1]
        vectors = [parameter for parameter in parameters if parameter.ndim <= 1]
        for members, weight_decay in ((matrices, settings.weight_decay), (vectors, 0.0)):
            if members:
                param_groups.append({"params": members, "weight_decay": weight_decay, "lr_scale": group.lr_scale})
    return torch.optim.AdamW(param_groups, lr=settings.lr, betas=settings.betas, fused=True)


def learning_rate(step: int, settings: StageSection) -> float:
    """Learning rate of step 0, 1, ...: linear warm-up, then constant, then the fall to 0 at `max_steps`."""
    if step < settings.warmup_steps:
        return settings.lr * (step + 1) / settings.warmup_steps
    if settings.decay == "constant":
        return settings.lr
    start = settings.warmup_steps if settings.decay_steps is None else settings.max_steps - settings.decay_steps
    done = max(0.0, (step - start) / max(1, settings.max_steps - start))
    return settings.lr * (1 - done if settings.decay == "linear" else (1 + math.cos(math.pi * done)) / 2)


def moments(optimizer: torch.optim.Optimizer, parameters: Mapping[str, Parameter]) -> dict[str, Tensor]:
    """What the optimizer remembers, by "name of the parameter/name of the moment"."""
    return {
        f"{name}/{kind}": value
        for name, parameter in parameters.items()
        for kind, value in optimizer.state.get(parameter, {}).items()
    }


def restore_moments(optimizer: torch.optim.Optimizer, parameters: Mapping[str, Parameter], saved: Mapping[str, Tensor]) -> None:
    """Give back what `moments` gave; learning rates and decays stay as they are."""
    for key, value in saved.items():
        name, kind = key.rsplit("/", 1)
        parameter = parameters[name]
        # Fused kernels walk through memory, so a moment must lie there in the order of its parameter.
        memory = (
            torch.empty_like(parameter) if value.shape == parameter.shape else torch.empty_like(value, device=parameter.device)
        )
        optimizer.state[parameter][kind] = memory.detach().copy_(value)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
