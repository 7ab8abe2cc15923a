"""Operators in float64: the adjoint is the adjoint, the proximal map is the minimum, the pseudo-inverse is one."""

from __future__ import annotations

import json

import numpy as np
import pytest
import scipy.ndimage
import torch
from PIL import Image

from latentdiff.errors import DataError, UsageError
from latentdiff.tasks.restoration import operators as ops
from latentdiff.tasks.restoration.operators import gaussian_blur, motion_blur

SIZE = (12, 16)


def lopsided(rows: int = 4, columns: int = 5) -> torch.Tensor:
    kernel = torch.rand(rows, columns, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    kernel[rows // 2, columns // 2] += 5.0  # well conditioned
    return kernel


def half_missing() -> torch.Tensor:
    return torch.rand(SIZE, generator=torch.Generator().manual_seed(1)) > 0.5


OPERATORS = {
    "denoise": ops.Denoise(),
    "inpaint": ops.Inpaint(half_missing()),
    "colourise": ops.Colourise(),
    **{
        f"{kernel}-{factor}-{border}": ops.SuperResolution(factor, kernel=kernel, border=border)
        for kernel, factor, border in [
            ("box", 2, "reflect"),
            ("box", 4, "periodic"),
            ("bicubic", 2, "periodic"),
            ("bicubic", 4, "reflect"),
            ("gaussian", 2, "reflect"),
            ("gaussian", 2, "periodic"),
        ]
        if 4 * factor <= min(SIZE) or border == "reflect"
    },
    **{
        f"blur-{name}-{border}": ops.Deblur(kernel, border=border)
        for border in ops.BORDERS
        for name, kernel in {
            "gaussian": gaussian_blur(0.6),
            "motion": motion_blur(4.0, 30.0),
            "lopsided": lopsided(),
        }.items()
    },
    "decimation": ops.Convolution(torch.ones(1, 1), centre=(0, 0), factor=2),
    "composition": ops.Composition(ops.Deblur(lopsided(), border="reflect"), ops.SuperResolution(2, kernel="box")),
    "inside": ops.Inside(ops.SuperResolution(2, kernel="bicubic"), (8, 10), SIZE),
    "function": ops.Function(lambda x: x[..., ::2] - 0.5 * x[..., 1::2], (3, *SIZE)),
}


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(params=OPERATORS, ids=str)
def operator(request):
    return OPERATORS[request.param]


def test_shapes_fit_and_the_adjoint_is_the_adjoint(operator):
    x = normal(2, 3, *SIZE)
    shape = operator.measurement_shape((3, *SIZE))
    y = normal(2, *shape, seed=1)
    assert operator.apply(x).shape == y.shape
    assert operator.image_shape(shape) == (3, *SIZE)
    assert operator.adjoint(y).shape == x.shape
    torch.testing.assert_close((operator.apply(x) * y).sum(), (x * operator.adjoint(y)).sum(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rho", [1e-2, 1.0, 50.0])
def test_prox_is_the_minimum(operator, rho):
    y = normal(2, *operator.measurement_shape((3, *SIZE)), seed=1)
    if isinstance(operator, ops.Inpaint):
        y = operator.apply(y)
    z = normal(2, 3, *SIZE, seed=2)
    x = operator.prox(y, z, rho)
    gradient = operator.adjoint(operator.apply(x) - y) + rho * (x - z)
    assert gradient.abs().max() < 1e-9 * max(1.0, rho)


def test_prox_between_its_limits(operator):
    truth, z = normal(1, 3, *SIZE), normal(1, 3, *SIZE, seed=2)
    y = operator.apply(truth)
    torch.testing.assert_close(operator.prox(y, z, 1e9), z, rtol=0, atol=1e-7)
    assert ops.residual(operator, y, operator.prox(y, z, 1e-6)).item() < 1e-2


def test_pseudo_inverse(operator):
    y, z = operator.apply(normal(2, 3, *SIZE)), normal(2, 3, *SIZE, seed=2)
    loose = {"rtol": 0, "atol": 1e-6}
    back = operator.pinv(y)
    torch.testing.assert_close(operator.apply(back), y, **loose)  # A A⁺ A = A
    torch.testing.assert_close(operator.pinv(operator.apply(back)), back, **loose)  # A⁺ A A⁺ = A⁺
    projected = operator.project(y, z)
    torch.testing.assert_close(operator.apply(projected), y, **loose)
    torch.testing.assert_close(operator.project(y, projected), projected, **loose)
    # The shortest way there: the step is orthogonal to whatever the operator does not see.
    unseen = truth_less(operator, normal(2, 3, *SIZE, seed=5))
    assert ((projected - z) * unseen).sum().abs() < 1e-5


def truth_less(operator, x):
    return x - operator.pinv(operator.apply(x))


def test_one_image_does_not_depend_on_its_batch(operator):
    y = normal(3, *operator.measurement_shape((3, *SIZE)), seed=1) * torch.tensor([0.1, 1.0, 10.0]).view(3, 1, 1, 1)
    z = normal(3, 3, *SIZE, seed=2)
    together = operator.prox(y, z, 0.1)
    alone = torch.cat([operator.prox(y[i : i + 1], z[i : i + 1], 0.1) for i in range(3)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", [name for name in OPERATORS if not name.startswith(("colour", "function", "inpaint"))])
def test_a_plain_image_stays_plain(name):
    operator = OPERATORS[name]
    y = operator.apply(torch.full((1, 3, *SIZE), 0.3, dtype=torch.float64))
    torch.testing.assert_close(y, torch.full_like(y, 0.3))


# --- Against SciPy and Pillow ---------------------------------------------------------------------


@pytest.mark.parametrize(("border", "mode"), [("periodic", "wrap"), ("reflect", "mirror")])
@pytest.mark.parametrize("shape", [(3, 3), (4, 5), (5, 4), (2, 2)], ids=str)
def test_blur_is_that_of_scipy(border, mode, shape):
    kernel = lopsided(*shape)
    x = normal(1, 3, *SIZE)
    blurred = ops.Deblur(kernel, border=border).apply(x)
    weights = (kernel / kernel.sum()).numpy()
    expected = np.stack([scipy.ndimage.convolve(channel, weights, mode=mode) for channel in x[0].numpy()])
    np.testing.assert_allclose(blurred[0].numpy(), expected, atol=1e-12)


def test_gaussian_blur_is_that_of_scipy():
    x = normal(1, 1, 32, 32)
    blurred = ops.Deblur(gaussian_blur(1.5), border="periodic").apply(x)
    expected = scipy.ndimage.gaussian_filter(x[0, 0].numpy(), 1.5, mode="wrap", truncate=4.0)
    np.testing.assert_allclose(blurred[0, 0].numpy(), expected, atol=1e-12)


@pytest.mark.parametrize("factor", [2, 3, 4])
@pytest.mark.parametrize(
    ("kernel", "pillow"), [("bicubic", Image.Resampling.BICUBIC), ("box", Image.Resampling.BOX)], ids=["bicubic", "box"]
)
def test_super_resolution_undoes_what_pillow_does(factor, kernel, pillow):
    x = normal(1, 1, 12 * factor, 12 * factor)
    small = ops.SuperResolution(factor, kernel=kernel).apply(x)[0, 0]
    image = Image.fromarray(x[0, 0].numpy().astype(np.float32))
    expected = np.asarray(image.resize((12, 12), pillow))
    inner = slice(2, -2) if kernel == "bicubic" else slice(None)  # at the border Pillow cuts its kernel
    np.testing.assert_allclose(small[inner, inner].numpy(), expected[inner, inner], atol=1e-5)


def test_a_point_stays_in_the_middle_of_a_symmetric_blur():
    point = torch.zeros(1, 1, 17, 17, dtype=torch.float64)
    point[..., 8, 8] = 1.0
    for kernel in (gaussian_blur(1.2), motion_blur(5.0, 45.0), motion_blur(6.0, 0.0)):
        for border in ops.BORDERS:
            blurred = ops.Deblur(kernel, border=border).apply(point)
            torch.testing.assert_close(blurred, blurred.flip(-1, -2))
            torch.testing.assert_close(blurred.sum(), torch.tensor(1.0, dtype=torch.float64))


def test_luminance_is_that_of_pillow():
    coloured = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0)).mul(255).round()
    grey = ops.Colourise().apply(coloured)[0, 0]
    image = Image.fromarray(coloured[0].permute(1, 2, 0).byte().numpy())
    assert (grey - torch.from_numpy(np.asarray(image.convert("L"), dtype=np.float32))).abs().max() <= 0.51


def test_motion_runs_where_the_angle_says():
    kernel = motion_blur(7.0, 90.0)
    assert kernel.sum(dim=1).gt(0).all() and kernel.sum(dim=0).gt(1e-12).sum() == 1
    falling = motion_blur(7.0, -45.0)
    assert falling.diagonal().sum() > 0.5


# --- A function of one's own ----------------------------------------------------------------------


def test_nonlinear_prox_is_a_minimum():
    def gamma(x):
        return torch.tanh(1.5 * x)

    operator = ops.Nonlinear(gamma, (3, *SIZE))
    z = 0.3 * normal(2, 3, *SIZE)
    y = gamma(0.3 * normal(2, 3, *SIZE, seed=1))
    x = operator.prox(y, z, 0.1).requires_grad_()
    cost = (y - gamma(x)).square().sum() + 0.1 * (x - z).square().sum()
    (gradient,) = torch.autograd.grad(cost, x)
    assert gradient.abs().max() < 1e-3  # of about 1 at z
    assert cost < (y - gamma(z)).square().sum()


def test_nonlinear_prox_of_a_linear_function_is_the_linear_one():
    def linear(x):
        return x[..., ::2] - 0.5 * x[..., 1::2]

    y, z = normal(1, 3, 12, 8), normal(1, 3, *SIZE, seed=1)
    expected = ops.Function(linear, (3, *SIZE)).prox(y, z, 0.2)
    torch.testing.assert_close(ops.Nonlinear(linear, (3, *SIZE)).prox(y, z, 0.2), expected, rtol=0, atol=1e-8)


@pytest.mark.parametrize(
    "make",
    [
        lambda: ops.Function(torch.tanh, (3, 8, 8)),
        lambda: ops.Function(lambda x: x.mean(), (3, 8, 8)),
        lambda: ops.Function(lambda x: x.detach(), (3, 8, 8)),
        lambda: ops.Function(lambda x: x @ torch.ones(5, 5), (3, 8, 8)),
        lambda: ops.SuperResolution(1),
        lambda: ops.SuperResolution(2, kernel="lanczos"),
        lambda: ops.Deblur(torch.zeros(3, 3)),
        lambda: ops.Deblur(torch.ones(3)),
        lambda: ops.Deblur(torch.ones(3, 3), border="zero"),
        lambda: ops.Denoise(noise_std=-0.1),
        lambda: ops.Denoise(noise_std=float("nan")),
        lambda: ops.Inpaint(torch.ones(1, 4, 4)),
        lambda: ops.Inpaint(torch.ones(4, 4)).measurement_shape((3, 5, 4)),
        lambda: ops.SuperResolution(4).measurement_shape((3, 30, 32)),
        lambda: ops.Deblur(torch.ones(9, 9)).measurement_shape((3, 4, 4)),
        lambda: ops.Deblur(torch.ones(9, 9), border="periodic").measurement_shape((3, 8, 8)),
        lambda: ops.Composition(),
        lambda: ops.Composition(ops.Nonlinear(torch.tanh, (3, 8, 8))),
        lambda: gaussian_blur(0.0),
        lambda: motion_blur(0.5),
        lambda: ops.Inside(ops.Denoise(), (9, 8), (8, 8)),
    ],
)
def test_what_does_not_fit_is_refused(make):
    with pytest.raises(UsageError):
        make()


@pytest.mark.parametrize("name", [name for name in OPERATORS if name not in ("function", "decimation")])
def test_a_description_says_everything(name):
    operator = OPERATORS[name].with_noise(0.05)
    again = ops.from_description(json.loads(json.dumps(ops.describe(operator))))
    x = normal(1, 3, *SIZE)
    assert torch.equal(again.apply(x), operator.apply(x))
    assert ops.describe(again) == ops.describe(operator)
    if name != "inside":  # which takes the noise of what it holds
        assert again.noise_std == 0.05


def test_own_functions_and_foreign_names_are_not_described():
    for values in (
        ops.describe(OPERATORS["function"]),
        {"name": "magic"},
        {"name": "inpaint"},
        {"name": "deblur", "kernel": 3},
    ):
        with pytest.raises(DataError):
            ops.from_description(values)


SEPARABLE = {
    "gaussian": ops.Deblur(gaussian_blur(1.5)),
    "horizontal motion": ops.Deblur(motion_blur(5.0, 0.0)),
    "bicubic": ops.SuperResolution(2, kernel="bicubic"),
    "lopsided": ops.Convolution(torch.outer(torch.tensor([0.1, -0.2, 0.5]), torch.tensor([0.5, 1.0])), centre=(0, 1)),
}


@pytest.mark.parametrize("name", SEPARABLE)
def test_an_outer_product_at_mirrors_is_solved_as_iterations_solve_it(name, monkeypatch):
    operator = SEPARABLE[name]
    draws = torch.Generator().manual_seed(0)
    z = torch.randn(2, 3, 24, 32, generator=draws, dtype=torch.float64)
    y = torch.randn(2, *operator.measurement_shape((3, 24, 32)), generator=draws, dtype=torch.float64)
    by_iterations = ops.Operator.prox(operator, y, z, 0.1)
    monkeypatch.setattr(ops.convolution, "conjugate_gradient", None)
    torch.testing.assert_close(operator.prox(y, z, 0.1), by_iterations, rtol=0, atol=1e-9)


def test_other_kernels_and_large_images_are_left_to_iterations(monkeypatch):
    z = torch.zeros(1, 3, 24, 32, dtype=torch.float64)
    assert ops.Deblur(motion_blur(9.0, 45.0))._separated(z) is None
    assert ops.Deblur(gaussian_blur(1.5))._separated(z) is not None
    monkeypatch.setattr(ops.convolution, "LONGEST", 31)
    assert ops.Deblur(gaussian_blur(1.5))._separated(z) is None


@pytest.mark.parametrize("kernel", [motion_blur(9.0, 45.0), motion_blur(7.0, 20.0)], ids=["9:45", "7:20"])
@pytest.mark.parametrize("rho", [2e-3, 1e-2, 0.2])
def test_at_mirrors_single_precision_is_solved_as_far_as_noise_allows(kernel, rho, monkeypatch):
    draws = torch.Generator().manual_seed(0)
    noise_std = 0.02
    operator = ops.Deblur(kernel, noise_std=noise_std)
    x, error = (ops.Deblur(gaussian_blur(2.0)).apply(torch.randn(2, 3, 64, 48, generator=draws)) for _ in range(2))
    y = operator.apply(x) + noise_std * torch.randn(x.shape, generator=draws)
    z = x + error
    exact = operator.prox(y.double(), z.double(), rho).float()
    products, apply = [], ops.Deblur.apply
    monkeypatch.setattr(ops.Deblur, "apply", lambda self, x: products.append(0) or apply(self, x))
    found = operator.prox(y, z, rho)
    assert len(products) <= 25
    missed, best = (ops.residual(operator, y, one) for one in (found, exact))
    assert (missed - best).abs().max() < 0.1 * noise_std
    # What is left open is in doubt anyway: the result is no further from the truth than the exact one.
    assert (found - x).square().mean() <= 1.2 * (exact - x).square().mean()


def test_a_change_is_carried_on_to_missing_pixels_and_nowhere_else():
    known = ~half_missing()
    ramp = torch.linspace(0.1, 0.3, SIZE[1], dtype=torch.float64).expand(2, 3, *SIZE)
    for operator in (ops.Inpaint(half_missing()), ops.Inside(ops.Inpaint(half_missing()), SIZE, (16, 16))):
        change = torch.nn.functional.pad(ramp * known, (0, 0, 0, 4 if isinstance(operator, ops.Inside) else 0))
        found = operator.completed(change)
        part = found[..., : SIZE[0], :]
        assert part[..., known].equal(change[..., : SIZE[0], :][..., known])
        assert (part - ramp)[..., ~known].abs().max() < 0.05
        assert not found[..., SIZE[0] :, :].any()
    nothing = ops.Inpaint(torch.ones(SIZE))
    assert nothing.completed(ramp) is ramp and ops.Denoise().completed(ramp) is ramp
