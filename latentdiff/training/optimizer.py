"""The optimizer, and its learning rate as a function of the step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from latentdiff.errors import ConfigError, MissingDependencyError
from latentdiff.training.muon import is_hidden, muon_step
from latentdiff.training.sections import StageSection
from latentdiff.training.sharding import is_split, own_part, part_of
from latentdiff.training.torch_private import adamw_step

# Entries of the groups of Prodigy and of schedule-free AdamW that change while they run.
_REMEMBERED = ("d", "d_max", "d_hat", "d_numerator", "d_denom", "k", "weight_sum", "lr_max", "scheduled_lr")

_MUON_MOMENTUM = 0.95
_MOST_RELATIVE = 1e-2


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that share a learning rate and a gradient norm.

    Args:
        name: stands in the log.
        parameters: by name.
        lr_scale: factor on the stage's learning rate.
        rates: another factor, beside it, for single parameters, by name.
        muon: whether the optimizer of that name trains its matrices; AdamW does otherwise.
    """

    name: str
    parameters: dict[str, Parameter]
    lr_scale: float = 1.0
    muon: bool = True
    rates: Mapping[str, float] = field(default_factory=dict)

    def by_rate(self, names: Iterable[str]) -> dict[float, list[Parameter]]:
        """These parameters by their factor on the stage's learning rate."""
        found: dict[float, list[Parameter]] = {}
        for name in names:
            found.setdefault(self.lr_scale * self.rates.get(name, 1.0), []).append(self.parameters[name])
        return found


def make_optimizer(groups: list[ParameterGroup], settings: StageSection) -> torch.optim.Optimizer:
    """The optimizer that `settings` name; biases and norms are not decayed.

    adamw is AdamW (Loshchilov and Hutter 2019), fused; adamw8bit keeps its moments in 8 bits (Dettmers et al. 2022);
    prodigy finds its step size by itself (Mishchenko and Defazio 2024), the learning rate is a factor on that;
    adafactor keeps one number a row and column in place of one a weight (Shazeer and Stern 2018), and with
    `relative_step` sets its steps as they do; lion steps by the sign of its momentum (Chen et al. 2023); schedulefree is
    AdamW with averages in place of a decay (Defazio et al. 2024), see `ScheduleFreeAverage`.

    Raises:
        ConfigError: groups have different learning rates, and the optimizer knows one alone.
        MissingDependencyError: the library of the optimizer is not installed.
    """
    param_groups = _by_decay(groups, settings)
    if (settings.optimizer == "prodigy" or settings.relative_step) and len({group["lr_scale"] for group in param_groups}) > 1:
        name = "prodigy" if settings.optimizer == "prodigy" else "adafactor with relative_step"
        raise ConfigError(
            f"{name} finds one step size for all; leave out learning rates of parts, or take another optimizer"
        )
    if settings.optimizer in _LIBRARIES:
        return _of_library(param_groups, settings)
    return FusedAdamW(param_groups, lr=settings.lr, betas=settings.betas)


def _by_decay(groups: list[ParameterGroup], settings: StageSection) -> list[dict[str, Any]]:
    """The groups as optimizers take them, parted by what decays and by what Muon trains."""
    param_groups: list[dict[str, Any]] = []
    for group in groups:
        muon = settings.optimizer == "muon" and group.muon
        hidden = {name for name, parameter in group.parameters.items() if muon and is_hidden(name, parameter)}
        others = {name: parameter for name, parameter in group.parameters.items() if name not in hidden}
        matrices = [name for name, parameter in others.items() if parameter.ndim > 1]
        vectors = [name for name, parameter in others.items() if parameter.ndim <= 1]
        by_muon = [name for name in group.parameters if name in hidden]
        for names, weight_decay, orthogonal in (
            (matrices, settings.weight_decay, False), (vectors, 0.0, False), (by_muon, settings.weight_decay, True),
        ):  # fmt: skip
            kind = {"orthogonal": True, "betas": (_MUON_MOMENTUM, 0.0)} if orthogonal else {}
            for scale, members in group.by_rate(names).items():
                param_groups.append({"params": members, "weight_decay": weight_decay, "lr_scale": scale, **kind})
    return param_groups


def _of_library(param_groups: list[dict[str, Any]], settings: StageSection) -> torch.optim.Optimizer:
    library, usual = _library(settings.optimizer), {"lr": settings.lr, "betas": settings.betas}
    if settings.optimizer == "adafactor":
        # By a learning rate, weights of all sizes change alike, as in AdamW; relative steps are shares of their size.
        relative = settings.relative_step
        rate = {"lr": None if relative else settings.lr, "relative_step": relative, "scale_parameter": relative}
        return library.Adafactor(param_groups, **rate)
    if settings.optimizer == "prodigy":
        # The warm-up of the learning rate must not count in the estimate of the step size.
        return library.Prodigy(param_groups, **usual, use_bias_correction=True, safeguard_warmup=True)
    if settings.optimizer == "schedulefree":
        made = library.AdamWScheduleFree(param_groups, **usual)
        made.train()  # where it stays: its other mode would have to be left again, which is not exact
        return made
    make = library.Lion if settings.optimizer == "lion" else library.optim.AdamW8bit
    return make(param_groups, **usual)


class FusedAdamW(torch.optim.Optimizer):
    """AdamW by the kernel of `torch.optim.AdamW(fused=True)`, to the bit; of split parameters, on this process's part.

    torch's own class loads the compiler, torch._dynamo, when it is made: 60 MB and seconds, for nothing here.

    Args:
        param_groups: each with `params` and `weight_decay`.
        lr: learning rate; `lr_scale` of a group is a factor on it.
        betas: moment decays.
    """

    def __init__(self, param_groups: list[dict[str, Any]], lr: float, betas: tuple[float, float]) -> None:
        super().__init__(param_groups, {"lr": lr, "betas": betas, "eps": 1e-8, "weight_decay": 0.0})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        self.param_groups.append({**self.defaults, **param_group})

    def zero_grad(self, set_to_none: bool = True) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad = None if set_to_none or parameter.grad is None else parameter.grad.zero_()

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            if group.get("orthogonal"):
                muon_step(group, self.state)
                continue
            members = [
                parameter for parameter in group["params"] if parameter.grad is not None and own_part(parameter).numel()
            ]
            states = [self._state_of(parameter) for parameter in members]
            if not members:
                continue
            adamw_step(
                [own_part(parameter) for parameter in members], [own_part(parameter.grad) for parameter in members],
                *([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq", "step")),
                lr=group["lr"], betas=group["betas"], weight_decay=group["weight_decay"], eps=group["eps"],
            )  # fmt: skip

    def _state_of(self, parameter: Tensor) -> dict[str, Tensor]:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), device=parameter.device)
            state["exp_avg"] = torch.zeros_like(own_part(parameter), memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(own_part(parameter), memory_format=torch.preserve_format)
        return state


# By optimizer, the module that has it.
_LIBRARIES = {
    "adafactor": "transformers.optimization",
    "adamw8bit": "bitsandbytes",
    "lion": "lion_pytorch",
    "prodigy": "prodigyopt",
    "schedulefree": "schedulefree",
}


def _library(optimizer: str) -> Any:
    name = _LIBRARIES[optimizer]
    try:
        return import_module(name)
    except ImportError as error:
        raise MissingDependencyError(
            f"the optimizer {optimizer} needs {name}: pip install 'latentdiff[optimizers]'; or take optimizer adamw"
        ) from error


def clip_gradients(parameters: Sequence[Parameter], largest: float) -> Tensor:
    """Scale the gradients down to the norm `largest` where theirs is larger; returns the norm that they had."""
    gradients = [own_part(parameter.grad) for parameter in parameters if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    if any(map(is_split, parameters)):
        square = norm.square()
        torch.distributed.all_reduce(square)
        norm = square.sqrt()
        torch._foreach_mul_(gradients, (largest / (norm + 1e-6)).clamp(max=1.0))
    elif norm.device.type != "cpu" or norm > largest:  # asking a GPU would mean to wait for it
        torch.nn.utils.clip_grads_with_norm_(parameters, largest, norm)
    return norm


def learning_rate(step: int, settings: StageSection) -> float:
    """Learning rate of step 0, 1, ...: linear warm-up, then constant, then the fall to 0 at `max_steps`.

    That of relative steps is a share of the size of each weight, and Adafactor's own (Shazeer and Stern 2018, section 8).
    """
    if settings.relative_step:
        return min(_MOST_RELATIVE, 1 / math.sqrt(step + 1))
    if step < settings.warmup_steps:
        return settings.lr * (step + 1) / settings.warmup_steps
    if settings.decay == "constant":
        return settings.lr
    start = settings.warmup_steps if settings.decay_steps is None else settings.max_steps - settings.decay_steps
    done = max(0.0, (step - start) / max(1, settings.max_steps - start))
    return settings.lr * (1 - done if settings.decay == "linear" else (1 + math.cos(math.pi * done)) / 2)


def moments(optimizer: torch.optim.Optimizer, parameters: Mapping[str, Parameter]) -> dict[str, Tensor]:
    """What the optimizer remembers of each parameter, by "name of the parameter/name of the moment"."""
    return {
        f"{name}/{kind}": torch.as_tensor(value)  # some libraries count steps in Python
        for name, parameter in parameters.items()
        for kind, value in optimizer.state.get(parameter, {}).items()
    }


def restore_moments(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, Parameter], saved: Mapping[str, Tensor]
) -> None:
    """Give back what `moments` gave; learning rates and decays stay as they are."""
    for key, value in saved.items():
        name, kind = key.rsplit("/", 1)
        parameter = parameters[name]
        if value.ndim == 0 and not value.is_floating_point():
            optimizer.state[parameter][kind] = value.item()
            continue
        # Fused kernels walk through memory, so a moment must lie there in the order of its parameter.
        alike = value.shape == parameter.shape and value.dtype == parameter.dtype
        place = own_part(parameter)
        value = part_of(value, parameter)
        memory = torch.empty_like(place) if alike else torch.empty_like(value, device=parameter.device)
        optimizer.state[parameter][kind] = memory.detach().copy_(value)


def group_state(optimizer: torch.optim.Optimizer) -> list[dict[str, float]]:
    """What the optimizer remembers of whole groups of parameters: estimates of the step size, sums of weights."""
    return [{name: float(group[name]) for name in _REMEMBERED if name in group} for group in optimizer.param_groups]


def restore_group_state(optimizer: torch.optim.Optimizer, saved: Sequence[Mapping[str, float]]) -> None:
    """Give back what `group_state` gave."""
    for group, values in zip(optimizer.param_groups, saved, strict=True):
        group.update({name: int(value) if name == "k" else value for name, value in values.items()})


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
