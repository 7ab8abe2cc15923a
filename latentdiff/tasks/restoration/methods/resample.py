"""ReSample (Song et al. 2024): every few steps the clean latents are solved for, and noise is put back on the
solution."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from latentdiff.diffusion.denoise import Noise, Step
from latentdiff.diffusion.parameterization import Denoiser
from latentdiff.diffusion.samplers import ddim
from latentdiff.diffusion.schedule import Level, posterior_variance
from latentdiff.tasks.restoration.methods.gradient import guided_step
from latentdiff.tasks.restoration.problem import InverseProblem, SamplingMethod, at_least_zero, within_noise


@dataclass(frozen=True, kw_only=True)
class ReSample(SamplingMethod):
    """DDIM with the nudge of latent DPS at each step, and hard consistency every `every` steps of the last two thirds.

    An event first walks `lookahead` steps ahead for a better prediction. In the middle third it is brought within the
    noise of the measurement as an image, and the change encoded; in the last third the latents are optimised through
    the decoder. Both stop at the noise level, since what follows fits noise. Then the solution is noised again
    (stochastic resampling, eq. 12 of the paper).

    Cost of N steps: N U-Net evaluations with gradients and `lookahead` without for each event; N decodings with
    gradients, and up to `iterations` more for each late event. The paper takes 500 steps, 2000 iterations; here 100 and
    50.

    Attributes:
        every: steps from one event to the next, the last one at the end; 0 is no events.
        nudge: the scale of the gradient step is nudge * alpha_cumprod.
        gamma: how much the solution counts against the walk's own latents when noise is put back.
        lr: of Adam, in the units of latents.
    """

    nudge: float = 0.5
    every: int = 10
    lookahead: int = 5
    gamma: float = 40.0
    iterations: int = 50
    lr: float = 5e-3

    def __post_init__(self) -> None:
        at_least_zero(nudge=self.nudge, gamma=self.gamma, lr=self.lr)
        at_least_zero(every=self.every, lookahead=self.lookahead, iterations=self.iterations)

    def step(self, problem: InverseProblem, levels: list[Level]) -> Step:
        """Algorithm 1 of the paper."""
        nudged = guided_step(
            ddim.step,
            lambda z0: problem.misfit(problem.autoencoder.decode(z0)),
            lambda x, level: self.nudge * level.alpha_cumprod,
        )
        steps = len(levels) - 1
        position = {level: index for index, level in enumerate(levels)}

        def step(
            denoiser: Denoiser, x: Tensor, level: Level, next_level: Level, state: None, noise: Noise
        ) -> tuple[Tensor, None]:
            moved, _ = nudged(denoiser, x, level, next_level, None, noise)
            index = position[next_level]
            if not self.every or 3 * index < steps or (steps - index) % self.every:
                return moved, None
            z0 = self._prediction_ahead(denoiser, moved, levels[index : index + self.lookahead + 1])
            solve = self._solve_in_latents if 3 * index >= 2 * steps else _solve_in_pixels
            return self._resampled(solve(problem, z0), moved, level, next_level, noise), None

        return step

    @staticmethod
    def _prediction_ahead(denoiser: Denoiser, x: Tensor, levels: list[Level]) -> Tensor:
        """The clean latents that a walk along the next few levels ends in."""
        with torch.no_grad():
            for level, next_level in pairwise(levels):
                prediction = denoiser(x, level)
                x = next_level.alpha * prediction.x0 + next_level.sigma * prediction.eps
        return prediction.x0 if len(levels) > 1 else x

    def _solve_in_latents(self, problem: InverseProblem, z0: Tensor) -> Tensor:
        """Adam on the squared misfit through the decoder; an image stands still once it is within the noise."""
        z = z0.detach().clone().requires_grad_()
        optimizer = torch.optim.Adam([z], lr=self.lr)
        with torch.enable_grad():
            for _ in range(self.iterations):
                image = problem.autoencoder.decode(z)
                open_ones = problem.residual(image.detach()) > problem.noise_std
                if not open_ones.any():
                    break
                optimizer.zero_grad()
                (problem.misfit(image).square() * open_ones).sum().backward(inputs=[z])
                before = z.detach().clone()
                optimizer.step()
                with torch.no_grad():  # Adam's memory would carry finished images on
                    z.copy_(torch.where(open_ones.view(-1, 1, 1, 1), z, before))
        return z.detach()

    def _resampled(self, z0: Tensor, x: Tensor, level: Level, next_level: Level, noise: Noise) -> Tensor:
        """A draw from the product of N(x, s²) and N(alpha z0, sigma²) at the next level."""
        variance = 1.0 - next_level.alpha_cumprod
        if variance == 0.0:
            return z0
        trust = self.gamma * posterior_variance(level, next_level)
        mean = (trust * next_level.alpha * z0 + variance * x) / (trust + variance)
        return mean + math.sqrt(trust * variance / (trust + variance)) * noise()


def _solve_in_pixels(problem: InverseProblem, z0: Tensor) -> Tensor:
    """What the paper's gradient descent in pixels, stopped early, goes towards: the nearest image within the
    noise."""
    image = problem.autoencoder.decode(z0)
    return problem.moved(z0, image, within_noise(problem.operator, problem.measurement, image, problem.noise_std))
