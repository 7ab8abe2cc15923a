"""Muon (Jordan et al. 2024): momentum whose update is brought near an orthogonal matrix, for the hidden layers of a network."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

# A quintic that takes every singular value from (0, 1] to about 1 in five rounds (Jordan et al. 2024).
_QUINTIC = (3.4445, -4.7750, 2.0315)
_ROUNDS = 5
# Root mean square of an update of AdamW, in units of the learning rate; with it one rate serves both (Liu et al. 2025).
_ADAM_RMS = 0.2

_NOT_HIDDEN = ("embedding", "conv_in.", "conv_out.")


def is_hidden(name: str, parameter: Tensor) -> bool:
    """Whether a parameter is a matrix or a kernel of a hidden layer; embeddings, first and last layer are not."""
    return parameter.ndim > 1 and not any(part in name for part in _NOT_HIDDEN)


@torch.no_grad()
def muon_step(group: dict[str, Any], state: dict[Tensor, dict[str, Tensor]]) -> None:
    """One step for a group of matrices and kernels, kernels as (out, in k k).

    Args:
        group: `params`, `lr`, `betas` (the first is the momentum) and `weight_decay`.
        state: of the optimizer; gets "momentum" of each parameter.
    """
    alike: dict[tuple[int, ...], list[tuple[Tensor, Tensor]]] = defaultdict(list)
    for parameter in group["params"]:
        if parameter.grad is None:
            continue
        kept = state[parameter]
        if not kept:
            kept["momentum"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        momentum = kept["momentum"].lerp_(parameter.grad, 1 - group["betas"][0])
        update = parameter.grad.lerp(momentum, group["betas"][0]).flatten(1)  # Nesterov's
        alike[update.shape].append((parameter, update))
    for (rows, columns), members in alike.items():
        directions = orthogonal(torch.stack([update for _, update in members]))
        size = group["lr"] * _ADAM_RMS * max(rows, columns) ** 0.5
        for (parameter, _), direction in zip(members, directions, strict=True):
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            parameter.add_(direction.view(parameter.shape).to(parameter.dtype), alpha=-size)


def orthogonal(matrices: Tensor) -> Tensor:
    """Matrices (n, rows, columns) with their singular values brought to about 1, in bfloat16, by Newton-Schulz iterations."""
    x = matrices.bfloat16()
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    a, b, c = _QUINTIC
    for _ in range(_ROUNDS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x
