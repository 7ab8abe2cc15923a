"""Restoration against closed forms, in float64: Gaussian priors, whose denoiser and posterior are known."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from latentdiff.diffusion.config import ScheduleConfig
from latentdiff.diffusion.denoise import denoise
from latentdiff.diffusion.parameterization import Prediction
from latentdiff.diffusion.samplers import ddim
from latentdiff.diffusion.schedule import NOISE_FREE, Level, Schedule, posterior_variance
from latentdiff.errors import UsageError
from latentdiff.tasks.restoration import operators as ops
from latentdiff.tasks.restoration.methods import (
    DPS,
    PIXELS,
    PSLD,
    Autoencoder,
    DiffPIR,
    Graikos,
    InverseProblem,
    ReSample,
    get_method,
    within_noise,
)
from latentdiff.tasks.restoration.methods.gradient import guided_step, predicted_with_gradient
from tests.analytic import gaussian, mixture
from tests.tasks.gaussian_field import (
    SHAPE,
    SIZE,
    Matrix,
    assert_same_distribution,
    exact_posterior_step,
    example,
    normal,
)

SCHEDULE = Schedule(
    ScheduleConfig(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="v_prediction",
        set_alpha_to_one=True, timestep_spacing="trailing",
    )
)  # fmt: skip
LEVEL, NEXT = SCHEDULE.level(600), SCHEDULE.level(500)


class Draws:
    """Normal noise of one shape, the same sequence each time."""

    def __init__(self, *shape: int, seed: int = 9) -> None:
        self.shape, self.generator = shape, torch.Generator().manual_seed(seed)

    def __call__(self) -> torch.Tensor:
        return torch.randn(self.shape, generator=self.generator, dtype=torch.float64)


def walk(method, denoiser, problem, steps, *, x=None, seed=9, view=lambda noise: noise):
    """The last latents of a method, from given noise; `view` is how the noise is arranged."""
    shape = tuple(problem.measurement.shape[:1]) + problem.operator.image_shape(tuple(problem.measurement.shape[1:]))
    draws = Draws(*shape, seed=seed)
    noise = lambda: view(draws())  # noqa: E731
    levels = method.levels(SCHEDULE, steps)
    x = method.start(problem, noise) if x is None else x
    *_, last = denoise(denoiser, x, levels, method.step(problem, levels), noise=noise)
    return last.x


# --- G1, G2, G3: means and covariances ------------------------------------------------------------

COUNT = 8192


@pytest.mark.parametrize("zeta", [0.0, 0.3, 1.0])
def test_diffpir_is_the_affine_map_of_its_equations(zeta):
    prior, operator, y = example()
    levels = SCHEDULE.levels(6)
    mean, covariance = torch.zeros(SIZE, dtype=torch.float64), torch.eye(SIZE, dtype=torch.float64)
    identity, matrix = covariance, operator.matrix
    for level, after in zip(levels[:-1], levels[1:], strict=True):
        rho = 2.0 * operator.noise_std**2 / level.sigma_hat**2
        shrink = torch.linalg.inv(matrix.T @ matrix + rho * identity)
        gain = prior.gain(level)
        to_x0 = rho * shrink @ gain
        constant = shrink @ (matrix.T @ y.flatten() + rho * (prior.mean - level.alpha * gain @ prior.mean))
        from_noise = after.sigma * math.sqrt(1 - zeta) / level.sigma
        linear = (after.alpha - from_noise * level.alpha) * to_x0 + from_noise * identity
        mean = linear @ mean + (after.alpha - from_noise * level.alpha) * constant
        covariance = linear @ covariance @ linear.T + zeta * after.sigma**2 * identity
    problem = InverseProblem(operator, y.expand(COUNT, -1, -1, -1))
    found = walk(DiffPIR(weight=2.0, zeta=zeta), prior.denoiser(), problem, 6)
    assert_same_distribution(found.flatten(1), mean, covariance)


@pytest.mark.parametrize("steps", [4, 50])
def test_exact_posterior_sampler_gives_the_posterior(steps):
    prior, operator, y = example()
    mean, covariance = prior.posterior(operator, y)
    levels = SCHEDULE.levels(steps)
    top = levels[0]
    start = top.alpha * (mean + normal(COUNT, SIZE, seed=7) @ torch.linalg.cholesky(covariance).T)
    x = (start + top.sigma * normal(COUNT, SIZE, seed=8)).view(COUNT, *SHAPE)
    step = exact_posterior_step(prior, operator, y)
    *_, last = denoise(prior.denoiser(), x, levels, step, noise=Draws(COUNT, *SHAPE))
    assert_same_distribution(last.x.flatten(1), mean, covariance)


@pytest.mark.parametrize(
    ("method", "steps", "far", "ratios"),
    [
        (DiffPIR(zeta=1.0), 50, 0.6, (0.4, 1.05)),
        (DiffPIR(zeta=0.3), 50, 0.8, (0.5, 1.4)),
        (DiffPIR(zeta=0.3, prior_std=0.7), 50, 0.8, (0.5, 1.4)),
    ],
    ids=["zeta 1", "zeta 0.3", "with a prior"],
)
def test_diffpir_comes_near_the_posterior(method, steps, far, ratios):
    """The known bias stays what it is: within these bounds, and not zero."""
    prior, operator, y = example()
    mean, covariance = prior.posterior(operator, y)
    deviation = covariance.diagonal().sqrt()
    samples = walk(method, prior.denoiser(), InverseProblem(operator, y.expand(2048, -1, -1, -1)), steps).flatten(1)
    assert ((samples.mean(dim=0) - mean).abs() / deviation).max() < far
    ratio = samples.std(dim=0) / deviation
    assert ratios[0] < ratio.min() and ratio.max() < ratios[1]


@pytest.mark.parametrize(
    "method",
    [DPS(scale=1.0), PSLD(scale=1.0), ReSample(every=5), Graikos(constraint=20.0, lr=0.05)],
    ids=lambda m: type(m).__name__,
)
def test_the_other_methods_move_towards_the_posterior(method):
    """Nearer to the posterior's mean than samples that know nothing of the measurement."""
    prior, operator, y = example(noise_std=0.1)
    mean, _ = prior.posterior(operator, y)
    problem = InverseProblem(operator, y.expand(6, -1, -1, -1))
    found = walk(method, prior.denoiser(), problem, 60).flatten(1)
    blind = walk(DiffPIR(weight=math.inf), prior.denoiser(), problem, 60).flatten(1)
    assert problem.residual(found.view(-1, *SHAPE)).mean() < 0.6 * problem.residual(blind.view(-1, *SHAPE)).mean()
    assert (found.mean(dim=0) - mean).norm() < (blind.mean(dim=0) - mean).norm()


# --- G4: a random field ---------------------------------------------------------------------------


def field(side: int = 32, *, seed: int = 0, count: int = 1):
    """Images with a power-law spectrum and variance 1/4, and their exact denoiser and blur's MMSE estimate."""
    frequency = torch.fft.fftfreq(side, dtype=torch.float64)
    radius = (frequency[:, None] ** 2 + frequency**2).sqrt().clamp(min=1 / side)
    power = radius**-2.5
    power = 0.25 * power / power.mean()
    white = normal(count, 1, side, side, seed=seed)
    images = torch.fft.ifft2(torch.fft.fft2(white) * power.sqrt()).real

    def filtered(x, response):
        return torch.fft.ifft2(torch.fft.fft2(x) * response).real

    def denoiser(x, level):
        x0 = filtered(x, level.alpha * power / (level.alpha_cumprod * power + level.sigma**2))
        eps = (x - level.alpha * x0) / level.sigma
        return Prediction(x0, eps, eps)

    return images, denoiser, power, filtered


def psnr(a, b):
    return 10 * math.log10(4 / (a - b).square().mean().item())


@pytest.mark.parametrize("noise_std", [0.01, 0.1])
def test_deblurring_a_random_field(noise_std):
    truth, denoiser, power, filtered = field()
    operator = ops.Deblur(ops.gaussian_blur(1.5), border="periodic", noise_std=noise_std)
    y = operator.apply(truth) + noise_std * normal(*truth.shape, seed=1)
    transfer = operator._transfer(truth)
    best = psnr(filtered(y, transfer.conj() * power / (transfer.abs().square() * power + noise_std**2)), truth)
    samples = walk(DiffPIR(zeta=1.0), denoiser, InverseProblem(operator, y.expand(8, -1, -1, -1)), 50)
    of_mean, of_one = psnr(samples.mean(dim=0), truth[0]), psnr(samples[0], truth[0])
    assert best - 3.01 - 0.5 < of_one < best  # a perfect sample lies 3.01 dB below the best estimate
    assert best - 0.8 < of_mean < best + 0.01  # the mean of 8 perfect ones 0.51 dB
    assert of_mean > psnr(y, truth) + 1.0


# --- G5, G6: estimates in closed form -------------------------------------------------------------


def test_graikos_settles_at_the_ridge_solution():
    """With a Gaussian prior and no noise drawn, the objective is quadratic: a ridge regression towards the mean."""
    prior, operator, y = example()
    level, constraint = SCHEDULE.level(400), 0.7
    problem, denoiser, method = InverseProblem(operator, y), prior.denoiser(), Graikos(constraint=constraint)
    # eps(alpha z) = (I - alpha gain) alpha (z - mean) / sigma.
    slope = level.alpha / level.sigma * (torch.eye(SIZE, dtype=torch.float64) - level.alpha * prior.gain(level))
    matrix = operator.matrix
    z = torch.linalg.solve(
        slope.T @ slope + constraint * matrix.T @ matrix,
        slope.T @ slope @ prior.mean + constraint * matrix.T @ y.flatten(),
    )
    z = z.view(1, *SHAPE).requires_grad_()
    noise = normal(1, *SHAPE, seed=6)
    both = [method.objective(problem, denoiser, z, level, sign * noise, constraint) for sign in (1.0, -1.0)]
    (gradient,) = torch.autograd.grad(sum(both).sum(), z)
    assert gradient.abs().max() < 1e-12

    # Without noise the objective is the same up to a constant, and Adam goes there as long as the constraint stays.
    silent = torch.zeros(1, *SHAPE, dtype=torch.float64)
    state, x = None, method.start(problem, lambda: silent)
    step = method.step(problem, [level] * 1_000_001)
    for _ in range(1500):
        x, state = step(denoiser, x, level, level, state, lambda: silent)
    assert (x - z).abs().max() < 1e-2


def test_denoising_from_the_level_of_the_noise_is_tweedie():
    mean, std, noise_std = 0.2, 0.4, 0.25
    level = Level(t=0.0, alpha_cumprod=1.0 / (1.0 + noise_std**2))
    y = normal(1, 3, 4, 4)
    found = gaussian(mean, std)(level.alpha * y, level).x0
    torch.testing.assert_close(found, mean + std**2 / (std**2 + noise_std**2) * (y - mean))


# --- G7: autoencoders that lose nothing -----------------------------------------------------------

SHUFFLE = Autoencoder(encode=lambda x: F.pixel_unshuffle(x, 2), decode=lambda z: F.pixel_shuffle(z, 2))
METHODS = {
    "diffpir": DiffPIR(),
    "dps": DPS(scale=5.0),
    "psld": PSLD(scale=5.0),
    "resample": ReSample(every=4, iterations=5),
    "graikos": Graikos(),
    "graikos without jacobian": Graikos(jacobian=False),
}


def small_problem(autoencoder=PIXELS, *, noise_std=0.05, count=2, operator=None):
    operator = operator or ops.Deblur(ops.gaussian_blur(0.7), border="periodic", noise_std=noise_std)
    y = operator.apply(normal(count, 3, 8, 8, seed=1).mul(0.5)) + noise_std * normal(count, 3, 8, 8, seed=2)
    return InverseProblem(operator, y, autoencoder)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_a_lossless_autoencoder_changes_nothing(method):
    pixels = walk(method, mixture(), small_problem(), 12)
    latents = walk(method, mixture(), small_problem(SHUFFLE), 12, view=SHUFFLE.encode)
    torch.testing.assert_close(SHUFFLE.decode(latents), pixels, rtol=0, atol=1e-9)


def test_gluing_vanishes_where_the_measurement_is_explained():
    problem = small_problem(SHUFFLE)
    truth = problem.operator.project(problem.measurement, normal(2, 3, 8, 8))
    z0 = SHUFFLE.encode(truth)
    assert PSLD(gluing=0.3).objective(problem)(z0).abs().max() < 1e-6


def test_a_linear_decoder_is_part_of_the_operator():
    """Latent DPS with A and an orthonormal decoder D is DPS with A D."""
    basis, _ = torch.linalg.qr(normal(SIZE, 4, seed=3))
    prior, operator, y = example()
    autoencoder = Autoencoder(
        encode=lambda x: (x.flatten(1) @ basis).view(-1, 1, 2, 2),
        decode=lambda z: (z.flatten(1) @ basis.T).view(-1, *SHAPE),
    )
    whole = Matrix(operator.matrix @ basis, noise_std=operator.noise_std)
    levels = SCHEDULE.levels(10)
    found = []
    for problem in (InverseProblem(operator, y, autoencoder), InverseProblem(whole, y)):
        step = DPS(scale=3.0).step(problem, levels)
        *_, last = denoise(gaussian(0.1, 0.5), normal(1, 1, 2, 2), levels, step, noise=Draws(1, 1, 2, 2))
        found.append(last.x)
    torch.testing.assert_close(*found, rtol=0, atol=1e-12)


# --- G8: what the methods become when parts are switched off --------------------------------------


def stepped(method_or_step, problem, *, x=None, denoiser=None):
    step = method_or_step if callable(method_or_step) else method_or_step.step(problem, [LEVEL, NEXT, NOISE_FREE])
    x = normal(2, 3, 8, 8, seed=4) if x is None else x
    return step(denoiser or mixture(), x, LEVEL, NEXT, None, Draws(2, 3, 8, 8))[0]


def ddim_step(eta=0.0):
    return lambda *arguments: ddim.step(*arguments, eta=eta)


def test_the_ladder():
    problem = small_problem()
    assert torch.equal(stepped(DPS(scale=0.0), problem), stepped(ddim_step(1.0), problem))
    assert torch.equal(stepped(PSLD(scale=0.0), problem), stepped(ddim_step(), problem))
    torch.testing.assert_close(stepped(DiffPIR(weight=math.inf, zeta=0.0), problem), stepped(ddim_step(), problem))
    assert torch.equal(stepped(PSLD(gluing=0.0), problem), stepped(DPS(scale=PSLD().scale, eta=0.0), problem))
    nudged = guided_step(ddim_step(), DPS().objective(problem), lambda x, level: 0.5 * level.alpha_cumprod)
    assert torch.equal(stepped(ReSample(every=0), problem), stepped(nudged, problem))
    # For a mask, the gluing term in pixels is the misfit once more.
    masked = small_problem(operator=ops.Inpaint(normal(8, 8) > 0))
    masked = InverseProblem(masked.operator, masked.operator.apply(masked.measurement))
    twice = stepped(PSLD(scale=1.0, gluing=0.25), masked), stepped(DPS(scale=1.25, eta=0.0), masked)
    torch.testing.assert_close(*twice, rtol=0, atol=1e-12)


@pytest.mark.parametrize("zeta", [0.0, 0.3, 1.0])
def test_fresh_noise_keeps_the_level(zeta):
    """Old and new noise of equal length and at right angles mix to noise of that length."""
    x0, old = torch.full((2, 3, 8, 8), 0.3, dtype=torch.float64), Draws(2, 3, 8, 8)()
    other = normal(2, 3, 8, 8, seed=11)
    other = other - (other * old).sum() / old.square().sum() * old
    other = other / other.norm() * old.norm()
    known = lambda x, level: Prediction(x0, old, old)  # noqa: E731
    step = DiffPIR(weight=math.inf, zeta=zeta).step(small_problem(), [LEVEL, NEXT, NOISE_FREE])
    found, _ = step(known, LEVEL.alpha * x0 + LEVEL.sigma * old, LEVEL, NEXT, None, lambda: other)
    assert (found - NEXT.alpha * x0).norm().item() == pytest.approx(NEXT.sigma * old.norm().item(), rel=1e-12)


def test_the_last_step_explains_the_measurement_unless_asked_otherwise():
    y = normal(2, 3, 8, 8, seed=3).clamp(-1, 1)
    missed = {}
    for paper in (False, True):
        problem = InverseProblem(ops.Denoise(noise_std=0.0), y)
        found = walk(DiffPIR(paper_final=paper), gaussian(0.0, 0.5), problem, 20)
        missed[paper] = (found - y).abs().max().item()
    assert missed[False] < 1e-4 < missed[True]


def test_resampling_is_the_product_of_two_gaussians():
    method, z0, x = ReSample(gamma=3.0), normal(1, 3, 2, 2), normal(1, 3, 2, 2, seed=1)
    trust, variance = 3.0 * posterior_variance(LEVEL, NEXT), NEXT.sigma**2
    precision = 1 / trust + 1 / variance
    mean = (x / trust + NEXT.alpha * z0 / variance) / precision
    for sign in (0.0, 1.0, -1.0):
        drawn = torch.full_like(x, sign)
        found = method._resampled(z0, x, LEVEL, NEXT, lambda drawn=drawn: drawn)
        torch.testing.assert_close(found, mean + drawn / math.sqrt(precision))


# --- G9: gradients --------------------------------------------------------------------------------

CURVED = Autoencoder(
    encode=lambda x: torch.atanh(0.5 * torch.tanh(F.pixel_unshuffle(x, 2))),
    decode=lambda z: F.pixel_shuffle(torch.sin(z) + 0.3 * z, 2),
)


@pytest.mark.parametrize("method", [DPS(), PSLD(gluing=0.5)], ids=["dps", "psld"])
def test_gradients_are_those_of_differences(method):
    problem = small_problem(CURVED, operator=ops.Deblur(ops.gaussian_blur(0.7), border="reflect", noise_std=0.05))
    objective, denoiser = method.objective(problem), mixture()
    x, way = normal(2, 12, 4, 4, seed=3), normal(2, 12, 4, 4, seed=5)
    _, gradient = predicted_with_gradient(denoiser, x, LEVEL, objective)
    ahead, behind = (objective(denoiser(x + h * way, LEVEL).x0).sum() for h in (1e-5, -1e-5))
    assert ((gradient * way).sum() - (ahead - behind) / 2e-5).abs() < 1e-6 * max(1.0, gradient.norm() * way.norm())


def test_graikos_gradient_is_that_of_differences():
    problem, method, denoiser = small_problem(CURVED), Graikos(), mixture()
    z, way, eps = (normal(2, 12, 4, 4, seed=seed) for seed in (3, 5, 6))

    def objective(z):
        return method.objective(problem, denoiser, z, LEVEL, eps, 0.5).sum()

    z = z.requires_grad_()
    (gradient,) = torch.autograd.grad(objective(z), z)
    difference = (objective(z + 1e-5 * way) - objective(z - 1e-5 * way)) / 2e-5
    assert ((gradient * way).sum() - difference).abs() < 1e-6 * gradient.norm() * way.norm()


# --- What they have in common ---------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_images_do_not_depend_on_their_batch_and_no_graph_is_kept(method):
    problem = small_problem()
    with torch.no_grad():
        together = walk(method, mixture(), problem, 8)
    assert not together.requires_grad
    alone = InverseProblem(problem.operator, problem.measurement[1:])
    draws = Draws(2, 3, 8, 8)
    noise = lambda: draws()[1:]  # noqa: E731
    levels = method.levels(SCHEDULE, 8)
    *_, last = denoise(mixture(), method.start(alone, noise), levels, method.step(alone, levels), noise=noise)
    torch.testing.assert_close(last.x, together[1:], rtol=0, atol=1e-10)


def test_within_noise():
    operator = ops.SuperResolution(2, kernel="bicubic", noise_std=0.1)
    truth = 0.5 * normal(2, 3, 8, 8)
    y = operator.apply(truth) + 0.1 * normal(2, 3, 4, 4, seed=1)
    guess = truth + 0.5 * normal(2, 3, 8, 8, seed=2)
    found = within_noise(operator, y, guess, 0.1)
    torch.testing.assert_close(
        ops.residual(operator, y, found), torch.full((2,), 0.1, dtype=torch.float64), rtol=0.01, atol=0
    )
    assert torch.equal(within_noise(operator, y, found, 0.11), found)
    mask = ops.Inpaint(normal(8, 8) > 0)
    kept = within_noise(mask, mask.apply(truth), guess, 0.001)
    torch.testing.assert_close(mask.apply(kept), mask.apply(truth), rtol=0, atol=1e-15)
    expected = guess + mask.completed(mask.apply(truth - guess))
    torch.testing.assert_close(kept, expected, rtol=0, atol=1e-15)


@pytest.mark.parametrize(
    "make",
    [
        lambda: DiffPIR(zeta=1.5),
        lambda: DiffPIR(weight=-1.0),
        lambda: DPS(scale=float("nan")),
        lambda: DPS(eta=2.0),
        lambda: PSLD(gluing=-0.1),
        lambda: ReSample(every=-1),
        lambda: Graikos(lr=-1.0),
        lambda: get_method("magic"),
        lambda: get_method("dps", zeta=1.0),
        lambda: PSLD().objective(InverseProblem(ops.Nonlinear(torch.tanh, (3, 8, 8)), torch.zeros(1, 3, 8, 8))),
    ],
)
def test_settings_outside_their_domain_are_refused(make):
    with pytest.raises(UsageError):
        make()


def test_settings_reach_the_method():
    assert get_method("diffpir", zeta=1.0) == DiffPIR(zeta=1.0)
    assert isinstance(get_method("psld"), PSLD)
