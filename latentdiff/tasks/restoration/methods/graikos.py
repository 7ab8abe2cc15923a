"""The optimisation of Graikos et al. 2022: a point that the denoiser finds likely and the measurement allows."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from latentdiff.diffusion.denoise import Noise, Step
from latentdiff.diffusion.parameterization import Denoiser
from latentdiff.diffusion.schedule import Level, Schedule
from latentdiff.tasks.restoration.problem import InverseProblem, at_least_zero


@dataclass(frozen=True, kw_only=True)
class Graikos:
    """Adam on |eps(alpha z + sigma e) - e|² + c |y - A D(z)|² over the latents z, with the noise level annealed.

    It gives a mode of the posterior, not a sample: different seeds come to similar images, which are smoother than
    samples.

    Cost of N steps: N U-Net evaluations with gradients (without, if `jacobian` is off) and N decodings with gradients.
    The paper takes 200 to 1000 steps.

    Attributes:
        constraint: c at the first step; it falls to 0 in equal steps.
        lr: of Adam, in the units of latents.
        jacobian: whether the gradient goes through the U-Net; without, it is that of score distillation (Poole et al.
            2023).
    """

    constraint: float = 1.0
    lr: float = 0.02
    jacobian: bool = True

    def __post_init__(self) -> None:
        at_least_zero(constraint=self.constraint, lr=self.lr)

    def levels(self, schedule: Schedule, steps: int) -> list[Level]:
        """t_i = (S - i + ⌊(S - i) / 4⌋ cos(i / 50)) T / S, kept inside the schedule: falling, and waving on the way."""
        total = schedule.num_train_timesteps
        waves = [(steps - i) + (steps - i) // 4 * math.cos(i / 50) for i in range(steps)]
        return [
            *(schedule.level(min(max(round(wave * total / steps), 1), total - 1)) for wave in waves),
            schedule.clean,
        ]

    def start(self, problem: InverseProblem, noise: Noise) -> Tensor:
        """The latents of the best linear estimate."""
        return problem.autoencoder.encode(problem.first_guess())

    def objective(
        self, problem: InverseProblem, denoiser: Denoiser, z: Tensor, level: Level, eps: Tensor, constraint: float
    ) -> Tensor:
        """Eq. 7 of the paper with one draw of noise, each image's own, (N,); differentiable in z (N, C, h, w)."""
        x = level.alpha * z + level.sigma * eps
        if self.jacobian:
            missed = (denoiser(x, level).eps - eps).square().flatten(1).sum(dim=1)
        else:
            with torch.no_grad():
                direction = 2.0 * level.alpha * (denoiser(x, level).eps - eps)
            missed = (direction * z).flatten(1).sum(dim=1)
        return missed + constraint * problem.misfit(problem.autoencoder.decode(z)).square()

    def step(self, problem: InverseProblem, levels: list[Level]) -> Step:
        """One step of Adam; the loop's x is z, and its state the moments of the gradient."""
        steps = len(levels) - 1

        def step(
            denoiser: Denoiser, x: Tensor, level: Level, next_level: Level, state: _Moments | None, noise: Noise
        ) -> tuple[Tensor, _Moments]:
            state = state or _Moments(0, torch.zeros_like(x), torch.zeros_like(x))
            constraint = self.constraint * (steps - state.count) / steps
            with torch.enable_grad():
                z = x.detach().requires_grad_()
                cost = self.objective(problem, denoiser, z, level, noise(), constraint)
                (gradient,) = torch.autograd.grad(cost.sum(), z)
            state = state.after(gradient)
            return x - self.lr * state.direction(), state

        return step


@dataclass(frozen=True)
class _Moments:
    """The memory of Adam (Kingma & Ba 2015), with its usual settings."""

    count: int
    mean: Tensor
    square: Tensor

    def after(self, gradient: Tensor) -> _Moments:
        return _Moments(
            self.count + 1, 0.9 * self.mean + 0.1 * gradient, 0.999 * self.square + 0.001 * gradient.square()
        )

    def direction(self) -> Tensor:
        mean, square = self.mean / (1.0 - 0.9**self.count), self.square / (1.0 - 0.999**self.count)
        return mean / (square.sqrt() + 1e-8)
