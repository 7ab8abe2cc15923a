"""DPS (Chung et al. 2023), its latent form, and PSLD (Rout et al. 2023): a gradient step towards the measurement each
time.

Gradients are taken through the denoiser, one step at a time: no graph outlives its step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from latentdiff.diffusion.denoise import Noise, Step
from latentdiff.diffusion.parameterization import Denoiser, Prediction
from latentdiff.diffusion.samplers import ddim
from latentdiff.diffusion.schedule import Level
from latentdiff.errors import UsageError
from latentdiff.tasks.restoration.operators import Nonlinear, Operator
from latentdiff.tasks.restoration.operators.operator import per_image_norm
from latentdiff.tasks.restoration.problem import InverseProblem, SamplingMethod, at_least_zero

# What DPS was tuned on: images of 256x256 in 1000 steps.
PAPER_ENTRIES, PAPER_STEPS = 256 * 256 * 3, 1000

# (predicted clean latents (N, C, h, w)) -> what is to become small, of each image, (N,).
Objective = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class DPS(SamplingMethod):
    """Diffusion posterior sampling: x - scale * gradient of |y - A D(x0(x))| with respect to x. In latents known as
    LDPS.

    Cost of N steps: N U-Net evaluations with gradients, about three times plain ones in time, with all activations in
    memory; in the latent space N decodings with gradients besides. The paper takes 1000 steps.

    Attributes:
        scale: zeta' of the paper, for its size and steps; it is scaled to other sizes and step counts so that a pixel
            moves as far in all: by sqrt(entries / 196608) and 1000 / steps.
        eta: the share of fresh noise in the DDIM step; 1 is the ancestral step of the paper.
    """

    scale: float = 0.3
    eta: float = 1.0

    def __post_init__(self) -> None:
        at_least_zero(scale=self.scale)
        if not 0.0 <= self.eta <= 1.0:
            raise UsageError(f"expected eta in 0 to 1, found {self.eta}")

    def objective(self, problem: InverseProblem) -> Objective:
        """|y - A D(z0)|, each image's own."""
        return lambda z0: problem.misfit(problem.autoencoder.decode(z0))

    def step(self, problem: InverseProblem, levels: list[Level]) -> Step:
        """Algorithm 1 of the paper."""
        objective, steps = self.objective(problem), len(levels) - 1

        def scale(x: Tensor, level: Level) -> float:
            return self.scale * math.sqrt(x[0].numel() / PAPER_ENTRIES) * PAPER_STEPS / steps

        return guided_step(partial(ddim.step, eta=self.eta), objective, scale)


@dataclass(frozen=True, kw_only=True)
class PSLD(DPS):
    """Posterior sampling in the latent space: besides, the latents must be those of an image that explains the
    measurement.

    The gluing term is |z0 - E(x0 + A⁺(y - A x0))|, x0 = D(z0). Takes linear operators only.

    Cost of N steps: N evaluations of the U-Net, the decoder and the encoder with gradients. The paper takes 1000 steps.

    Attributes:
        gluing: gamma over omega, the weight of the gluing term against that of the measurement.
    """

    eta: float = 0.0
    gluing: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least_zero(gluing=self.gluing)

    def objective(self, problem: InverseProblem) -> Objective:
        """Eq. 9 of the paper, with the pseudo-inverse where the paper's transpose is one only for operators that
        select."""
        if isinstance(problem.operator, Nonlinear):
            raise UsageError("the method psld takes linear operators only; take diffpir, dps or resample")
        encode, decode = problem.autoencoder.encode, problem.autoencoder.decode

        def objective(z0: Tensor) -> Tensor:
            image = decode(z0)
            measured = problem.misfit(image)
            if self.gluing == 0.0:
                return measured
            glued = encode(_Project.apply(image, problem.operator, problem.measurement))
            return measured + self.gluing * per_image_norm(z0 - glued)

        return objective


def guided_step(base: Step, objective: Objective, scale: Callable[[Tensor, Level], float]) -> Step:
    """A step that then goes down the gradient of `objective(x0(x))` with respect to where it began, by `scale(x,
    level)`."""

    def step(
        denoiser: Denoiser, x: Tensor, level: Level, next_level: Level, state: Any, noise: Noise
    ) -> tuple[Tensor, Any]:
        prediction, gradient = predicted_with_gradient(denoiser, x, level, objective)
        moved, state = base(lambda *_: prediction, x, level, next_level, state, noise)
        return moved - scale(x, level) * gradient, state

    return step


def predicted_with_gradient(
    denoiser: Denoiser, x: Tensor, level: Level, objective: Objective
) -> tuple[Prediction, Tensor]:
    """The prediction at x (N, C, h, w), free of any graph, and the gradient of the objective of its x0, (N, C, h,
    w)."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        prediction = denoiser(x, level)
        (gradient,) = torch.autograd.grad(objective(prediction.x0).sum(), x)
    x0, eps, raw = (tensor.detach() for tensor in (prediction.x0, prediction.eps, prediction.raw))
    return Prediction(x0, eps, raw, prediction.guided), gradient


class _Project(torch.autograd.Function):
    """`operator.project` with its derivative I - A⁺A, which is symmetric; so iterative pseudo-inverses need no
    graph."""

    @staticmethod
    def forward(ctx: Any, image: Tensor, operator: Operator, measurement: Tensor) -> Tensor:
        ctx.operator = operator
        return operator.project(measurement, image.detach())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient - ctx.operator.pinv(ctx.operator.apply(gradient)), None, None
