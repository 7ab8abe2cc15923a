"""DiffPIR (Zhu et al. 2023): between two steps of the sampler, the prediction is brought in line with the
measurement."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from latentdiff.diffusion.denoise import Noise, Step
from latentdiff.diffusion.parameterization import Denoiser, Prediction
from latentdiff.diffusion.schedule import Level
from latentdiff.errors import UsageError
from latentdiff.tasks.restoration.problem import InverseProblem, SamplingMethod, at_least_zero


@dataclass(frozen=True, kw_only=True)
class DiffPIR(SamplingMethod):
    """Half-quadratic splitting: the denoiser proposes, the proximal map of the operator disposes.

    In the latent space the proximal step is made in pixels, and its change is encoded: z0 + E(x~) - E(D(z0)).

    Cost of N steps: N U-Net evaluations, no gradients. In the latent space N decodings and 2 N encodings besides.

    Attributes:
        weight: lambda, how strongly to keep to the prediction; 1 is what the noise levels say, `inf` switches the
            measurement
        off. zeta: 0 to 1, the share of fresh noise at each step: 0 repeats the predicted noise, 1 draws all of it again. About
        0.3
            spreads its samples most nearly as the posterior does; 1 gives smoother images.
        prior_std: how far a pixel strays from its mean at all. At noise levels far above it a prediction is better than
            its noise level says; `inf` is the paper's.
        begin: the noise level sigma_hat from which on the measurement counts. Far above the spread of the data the next
            step drowns what it says; `inf` is the paper's.
        paper_final: leave the proximal step out at the end, as the paper's code does. The measurement is then missed a
            little.
    """

    weight: float = 1.0
    zeta: float = 0.3
    prior_std: float = math.inf
    begin: float = math.inf
    paper_final: bool = False

    def __post_init__(self) -> None:
        at_least_zero(weight=self.weight, prior_std=self.prior_std, begin=self.begin)
        if not 0.0 <= self.zeta <= 1.0:
            raise UsageError(f"expected zeta in 0 to 1, found {self.zeta}")

    def rho(self, problem: InverseProblem, level: Level) -> float:
        """The weight of the prediction against the measurement: lambda noise² / variance of the prediction."""
        precision = 1.0 / level.sigma_hat**2 + 1.0 / self.prior_std**2
        # Without any signal and any prior the prediction weighs nothing; what the operator cannot see still stays in
        # place.
        return max(self.weight * problem.noise_std**2 * precision, 1e-9)

    def denoiser(self, problem: InverseProblem, denoiser: Denoiser) -> Denoiser:
        """The denoiser whose predictions explain the measurement; the noise follows from x and the new x0."""

        def consistent(x: Tensor, level: Level) -> Prediction:
            prediction = denoiser(x, level)
            if level.sigma_hat > self.begin:
                return prediction
            image = problem.autoencoder.decode(prediction.x0)
            explained = problem.operator.prox(problem.measurement, image, self.rho(problem, level))
            x0 = problem.moved(prediction.x0, image, explained)
            return Prediction(x0, (x - level.alpha * x0) / level.sigma, prediction.raw, prediction.guided)

        return denoiser if math.isinf(self.weight) else consistent

    def step(self, problem: InverseProblem, levels: list[Level]) -> Step:
        """Algorithm 1 of the paper, with the proximal step at the end as well."""

        def step(
            denoiser: Denoiser, x: Tensor, level: Level, next_level: Level, state: None, noise: Noise
        ) -> tuple[Tensor, None]:
            untouched = self.paper_final and next_level == levels[-1]
            prediction = (denoiser if untouched else self.denoiser(problem, denoiser))(x, level)
            return _renoised(prediction, next_level, self.zeta, noise), None

        return step


def _renoised(prediction: Prediction, level: Level, zeta: float, noise: Noise) -> Tensor:
    """The prediction at `level`, with part of its noise drawn again (eq. 14 of the paper)."""
    eps = prediction.eps
    if zeta > 0.0 and level.sigma > 0.0:
        eps = math.sqrt(1.0 - zeta) * eps + math.sqrt(zeta) * noise()
    return level.alpha * prediction.x0 + level.sigma * eps
