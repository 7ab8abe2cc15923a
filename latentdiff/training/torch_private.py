"""What training calls of torch by private names, each with a public way where a release of torch lacks it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def adamw_step(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    averages: Sequence[Tensor],
    squares: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    lr: float,
    betas: tuple[float, float],
    weight_decay: float,
    eps: float,
) -> None:
    """One step of AdamW (Loshchilov and Hutter 2019) in place, by the kernel of `torch.optim.AdamW(fused=True)`.

    The class itself loads torch's compiler, 60 MB, when it is made.

    Args:
        averages, squares: of the gradients, as they are averaged from step to step.
        steps: how many there have been, of each parameter; counted on.
    """
    kernel = getattr(torch, "_fused_adamw_", None)
    if kernel is None:
        from torch.optim.adamw import adamw

        adamw(
            list(parameters), list(gradients), list(averages), list(squares), [], list(steps), foreach=False,
            lr=lr, beta1=betas[0], beta2=betas[1], weight_decay=weight_decay, eps=eps, amsgrad=False, maximize=False,
        )  # fmt: skip
        return
    for step in steps:
        step += 1
    kernel(
        parameters, gradients, averages, squares, [], steps, lr=lr, beta1=betas[0], beta2=betas[1],
        weight_decay=weight_decay, eps=eps, amsgrad=False, maximize=False,
    )  # fmt: skip
