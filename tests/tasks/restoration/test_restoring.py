"""`restore` on a tiny model with random weights: what must hold whatever the model has learned."""

from __future__ import annotations

import gc
import json

import numpy as np
import pytest
import torch
from PIL import Image

from latentdiff import Pipeline
from latentdiff.diffusion.denoise import Cancelled
from latentdiff.errors import DataError, UsageError
from latentdiff.image import to_pil, to_tensor
from latentdiff.recipe import read_recipe
from latentdiff.tasks import restore
from latentdiff.tasks.restoration import operators as ops
from latentdiff.tasks.restoration.task import again
from tests import peers
from tests.tasks.images import an_image, pixels

QUICK = {"steps": 3, "seed": 7, "progress": False}
METHODS = ("diffpir", "dps", "psld", "resample", "graikos")


@pytest.fixture(scope="module")
def pipe():
    return Pipeline.load(peers.folder("sd1"), device="cpu")


def hole(width: int, height: int) -> torch.Tensor:
    missing = torch.zeros(height, width)
    missing[4:12, 6:14] = 1.0
    return missing


@pytest.mark.parametrize("method", METHODS)
def test_every_method_gives_images_that_explain_the_measurement(pipe, method):
    operator = ops.SuperResolution(2, noise_std=0.1)
    found = restore(pipe, an_image(16, 12), operator, method=method, samples=2, **QUICK)
    assert [image.size for image in found.images] == [(32, 24)] * 2
    assert found.residuals == pytest.approx([0.1, 0.1], rel=0.05)
    assert found.uncertainty.shape == (24, 32) and found.uncertainty.max() > 0
    assert found.uncertainty_image().size == (32, 24)
    expected = np.mean([pixels(image).astype(float) for image in found.images], axis=0)
    assert np.abs(pixels(found.mean) - expected).max() <= 1


@pytest.mark.parametrize("size", [(24, 16), (21, 19)], ids=str)
def test_known_pixels_stay_to_the_last_bit(pipe, size):
    damaged = an_image(*size)
    (found,) = restore(pipe, damaged, ops.Inpaint(hole(*size)), **QUICK).images
    known = hole(*size).numpy() == 0
    assert found.size == size
    assert np.array_equal(pixels(found)[known], pixels(damaged.convert("RGB"))[known])
    assert not np.array_equal(pixels(found)[~known], pixels(damaged.convert("RGB"))[~known])


def test_with_nothing_missing_the_image_comes_back_and_with_nothing_known_it_is_generated(pipe):
    damaged = an_image(24, 16)
    for operator in (ops.Denoise(), ops.Inpaint(torch.zeros(16, 24))):
        (found,) = restore(pipe, damaged, operator, **QUICK).images
        assert np.array_equal(pixels(found), pixels(damaged.convert("RGB")))
    blind = restore(
        pipe, damaged, ops.Inpaint(torch.ones(16, 24)), prompt="cat", settings={"zeta": 0.0}, **QUICK
    ).images[0]
    made = pipe("cat", guidance_scale=3.0, height=16, width=24, **QUICK)[0]
    assert np.abs(pixels(blind).astype(int) - pixels(made)).max() <= 1


def test_seeds_decide_and_only_what_is_unseen(pipe):
    operator, damaged = ops.Inpaint(hole(24, 16)), an_image(24, 16)
    both = restore(pipe, damaged, operator, samples=2, **QUICK).images
    alone = restore(pipe, damaged, operator, **{**QUICK, "seed": 8}).images[0]
    assert np.abs(pixels(both[1]).astype(int) - pixels(alone)).max() <= 1
    differ = (pixels(both[0]) != pixels(both[1])).any(axis=-1)
    assert differ.any() and not (differ & (hole(24, 16).numpy() == 0)).any()


def test_noisy_measurements_are_not_copied(pipe):
    noisy = to_tensor([an_image(24, 16)])
    found = restore(pipe, noisy, ops.Denoise(noise_std=0.3), keep_measurement=True, **QUICK)
    assert found.residuals == pytest.approx([0.3], rel=0.05)
    loose = restore(pipe, noisy, ops.Denoise(), noise_std=0.3, keep_measurement=False, **QUICK)
    assert loose.noise_std == 0.3 and loose.residuals[0] > 0.3


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_operator_in_every_precision(precision):
    pipe = Pipeline.load(peers.folder("sd1"), device="cpu", precision=precision)
    blurred = ops.Deblur(ops.gaussian_blur(0.7), noise_std=0.02)
    for operator in (
        ops.Colourise(noise_std=0.02),
        blurred,
        ops.Composition(blurred, ops.Inpaint(hole(24, 16)), noise_std=0.02),
        ops.Function(lambda x: x.flip(-1), (3, 16, 24), noise_std=0.02),
        ops.Nonlinear(lambda x: x - 0.1 * x**3, (3, 16, 24), noise_std=0.02),
    ):
        found = restore(pipe, an_image(24, 16), operator, **{**QUICK, "steps": 2})
        assert found.residuals[0] < 0.03


@pytest.mark.parametrize("samples", [1, 2])
def test_recipes_make_it_again(pipe, tmp_path, samples):
    an_image(24, 16).save(tmp_path / "photo.png")
    operator = ops.Deblur(ops.motion_blur(3.0, 20.0), noise_std=0.05)
    options = {"settings": {"zeta": 0.5}, "prompt": "red fox", "negative_prompt": "dog", **QUICK}
    found = restore(pipe, tmp_path / "photo.png", operator, samples=samples, **options)
    for image in (found.images[-1], found.mean):
        recipe = read_recipe(json.loads(json.dumps(image.info)))
        assert recipe.task == "restore" and recipe.sources["image"]["file"] == "photo.png"
        made = again(pipe, recipe, {"image": tmp_path / "photo.png"})
        assert np.abs(pixels(made).astype(int) - pixels(image)).max() <= 2
        assert read_recipe(made.info) == recipe


def test_what_no_recipe_holds_is_said(pipe):
    own = restore(pipe, an_image(24, 16), ops.Function(lambda x: 0.5 * x, (3, 16, 24)), **QUICK)
    from_memory = restore(pipe, to_tensor([an_image(24, 16)]), ops.Denoise(noise_std=0.1), **QUICK)
    for found in (own, from_memory):
        with pytest.raises(DataError):
            again(pipe, read_recipe(found.images[0].info), {})


def test_the_callback_sees_the_steps_and_cancels(pipe):
    seen = []

    def callback(step, t, x0):
        seen.append((step, tuple(x0.shape)))
        return step < 1

    with pytest.raises(Cancelled):
        restore(pipe, an_image(24, 16), ops.Denoise(noise_std=0.1), method="dps", callback=callback, **QUICK)
    assert seen == [(0, (1, 4, 2, 3)), (1, (1, 4, 2, 3))]


@pytest.mark.parametrize("method", METHODS)
def test_no_graph_is_kept_from_step_to_step(pipe, method):
    alive = []

    def callback(step, t, x0):
        if step in (2, 7):
            gc.collect()
            alive.append(sum(type(thing) is torch.Tensor for thing in gc.get_objects()))

    options = {**QUICK, "steps": 9}
    restore(pipe, an_image(16, 16), ops.Denoise(noise_std=0.1), method=method, callback=callback, **options)
    assert alive[1] <= alive[0] + 2


@pytest.mark.parametrize(
    ("image", "operator", "options"),
    [
        (an_image(4, 4), ops.Denoise(noise_std=0.1), {}),
        (an_image(1, 1), ops.Denoise(noise_std=0.1), {}),
        (an_image(1, 1), ops.SuperResolution(4), {}),
        (an_image(16, 16), ops.Inpaint(torch.zeros(16, 8)), {}),
        (an_image(8, 8), ops.Deblur(ops.gaussian_blur(3.0)), {}),
        (an_image(16, 16), ops.Function(lambda x: 2 * x, (3, 8, 8)), {}),
        (torch.zeros(3, 16, 16), ops.Denoise(), {}),
        (torch.full((1, 3, 16, 16), float("nan")), ops.Denoise(), {}),
        (torch.zeros(1, 3, 16, 16), ops.Colourise(), {}),
        (an_image(16, 16), ops.Denoise(), {"method": "magic"}),
        (an_image(16, 16), ops.Denoise(), {"settings": {"magic": 1.0}}),
        (an_image(16, 16), ops.Denoise(), {"noise_std": -1.0}),
        (an_image(16, 16), ops.Denoise(), {"samples": 0}),
        (an_image(16, 16), ops.Denoise(), {"steps": 0}),
        (an_image(16, 16), ops.Denoise(), {"sampler": "euler"}),
    ],
)
def test_what_does_not_fit_is_refused_before_any_work(pipe, image, operator, options):
    def never(*_):
        pytest.fail("work was begun")

    with pytest.raises(UsageError):
        restore(pipe, image, operator, callback=never, **{**QUICK, **options})


def test_one_sample_has_no_uncertainty(pipe):
    found = restore(pipe, an_image(16, 16), ops.Denoise(noise_std=0.2), **QUICK)
    assert found.uncertainty is None and np.array_equal(pixels(found.mean), pixels(found.images[0]))
    with pytest.raises(UsageError):
        found.uncertainty_image()


def test_any_mode_of_image(pipe):
    grey = Image.fromarray(np.full((16, 16), 90, np.uint8))
    found = restore(pipe, grey, ops.Colourise(), **QUICK)
    luminance = pixels(found.images[0].convert("L")).astype(int)
    assert found.images[0].mode == "RGB" and np.abs(luminance - 90).mean() <= 2  # some colours are clipped
    clear = to_pil(torch.zeros(1, 3, 16, 16))[0].convert("RGBA")
    assert restore(pipe, clear, ops.Denoise(), **QUICK).images[0].mode == "RGB"
