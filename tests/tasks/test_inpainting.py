from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from PIL import Image

from latentdiff.diffusion.denoise import Cancelled
from latentdiff.diffusion.samplers.restart import down_or_up
from latentdiff.diffusion.schedule import Level
from latentdiff.errors import UsageError
from latentdiff.image import save_png
from latentdiff.recipe import read_recipe
from latentdiff.tasks import TASKS, inpaint
from latentdiff.tasks.masks import filled, latent_mask
from tests import peers
from tests.tasks.images import SCHEDULERS, an_image, apart, in_diffusers, mask, pixels

shared = cache(peers.ours)
QUICK = {"steps": 4, "seed": 3, "progress": False}
BOX = (16, 24, 48, 56)


def inside(image: Image.Image | np.ndarray, box=BOX) -> np.ndarray:
    left, top, right, bottom = box
    array = pixels(image) if isinstance(image, Image.Image) else image
    return array[..., top:bottom, left:right, :]


def changed(result: Image.Image, source: Image.Image) -> np.ndarray:
    return (pixels(result) != pixels(source)).any(axis=-1)


@pytest.mark.parametrize("strength", [0.55, 1.0])
@pytest.mark.parametrize(
    ("family", "sampler"),
    [
        ("sd1", "ddim"),
        ("sd2", "ddim"),
        ("sd1", "euler"),
        ("sd1", "dpmpp-2m"),
        ("inpaint", "ddim"),
        ("inpaint", "euler"),
        ("xl", "ddim"),
        ("xl-inpaint", "euler"),
    ],
)
def test_same_image_as_diffusers(family, sampler, strength):
    expected = in_diffusers(
        "inpaint", family, sampler, [7, 8], prompt="a photo of the cat", negative_prompt="red fox", image=an_image(),
        mask_image=mask(BOX), height=64, width=64, strength=strength, num_inference_steps=8, guidance_scale=5.0,
    )  # fmt: skip
    images = inpaint(
        shared(family), an_image(), mask(BOX), "a photo of the cat", negative_prompt="red fox", strength=strength, steps=8,
        sampler=sampler, spacing=SCHEDULERS[sampler][1], seed=7, num_images=2, guidance_scale=5.0, progress=False,
    )  # fmt: skip
    assert inside(expected).std() > 20
    for image, other in zip(images, expected, strict=True):
        assert np.abs(inside(image) - inside(other)).max() <= 1


def test_masks_off_the_grid_paint_every_cell_that_they_touch():
    """diffusers reads one pixel of each cell; given the cells that we paint, it makes the same image."""
    thin = mask((13, 5, 14, 50))
    cells = (latent_mask(thin, 8)[0, 0].numpy() * 255).astype(np.uint8).repeat(8, 0).repeat(8, 1)
    assert cells[0:56, 8:16].all() and cells.sum() == 255 * 56 * 8
    expected = in_diffusers(
        "inpaint", "sd1", "ddim", [3], prompt="cat", image=an_image(), mask_image=Image.fromarray(cells), height=64, width=64,
        strength=1.0, num_inference_steps=4, guidance_scale=5.0,
    )  # fmt: skip
    (image,) = inpaint(shared("sd1"), an_image(), thin, "cat", **QUICK)
    assert np.abs(inside(image, (13, 5, 14, 50)) - inside(expected[0], (13, 5, 14, 50))).max() <= 1
    assert np.array_equal(changed(image, an_image()).any(axis=0).nonzero()[0], [13])


@pytest.mark.parametrize("family", ["sd1", "inpaint"])
@pytest.mark.parametrize("options", [{}, {"only_masked": True, "padding": 4}, {"strength": 0.5}])
def test_what_is_not_masked_stays_to_the_last_bit(family, options):
    source, hole = an_image(61, 43), mask((10, 20, 30, 29), 61, 43)
    for image in inpaint(shared(family), source, hole, "cat", num_images=2, **QUICK, **options):
        assert image.size == source.size
        difference = changed(image, source)
        assert not difference[np.asarray(hole) == 0].any()
        assert difference[np.asarray(hole) == 255].mean() > 0.9


def test_soft_masks_mix():
    source = an_image()
    soft = Image.fromarray(np.tile(np.linspace(0, 255, 64).astype(np.uint8), (64, 1)))
    (image,) = inpaint(shared("sd1"), source, soft, "cat", **QUICK)
    distance = np.abs(pixels(image) - pixels(source)).mean(axis=(0, 2))  # by column
    assert distance[0] == 0 and distance[:8].mean() < distance[24:32].mean() < distance[56:].mean()


def test_growth_and_blur_of_the_mask():
    source = an_image()
    sharp, grown, blurred = (
        changed(inpaint(shared("sd1"), source, mask((28, 28, 36, 36)), "cat", **QUICK, **options)[0], source)
        for options in ({}, {"grow": 5}, {"grow": 5, "blur": 2.0})
    )
    rows = [np.flatnonzero(area.any(axis=1)) for area in (sharp, grown, blurred)]
    assert (rows[0][0], rows[0][-1]) == (28, 35)
    assert (rows[1][0], rows[1][-1]) == (23, 40)
    assert 16 <= rows[2][0] < 23 and 40 < rows[2][-1] <= 47


def test_full_mask_paints_everything():
    (image,) = inpaint(shared("sd1"), an_image(), Image.new("L", (64, 64), 255), "cat", **QUICK)
    assert changed(image, an_image()).mean() > 0.9
    (generated,) = shared("sd1")("cat", **QUICK)
    assert apart(image, generated) > 1  # diffusers draws the start noise after the latents of the image


def test_strength_zero_gives_the_image_back():
    (image,) = inpaint(shared("sd1"), an_image(), mask(BOX), "cat", strength=0.0, repeats=2, **QUICK)
    assert apart(image, an_image()) == 0


@pytest.mark.parametrize(
    ("hole", "options", "message"),
    [
        (mask(BOX, 32, 64), {}, "image's size, 64 x 64 pixels, found 32 x 64"),
        (Image.new("L", (64, 64)), {}, "mask is empty"),
        (Image.new("RGBA", (64, 64), (255, 255, 255, 0)), {}, "opposite ways"),
        (None, {}, "expected a mask, or margins"),
        (mask(BOX), {"grow": -1}, "growth of 0 or more"),
        (mask(BOX), {"blur": float("nan")}, "blur to be a finite number"),
        (mask(BOX), {"padding": -1}, "padding to be a whole number of 0 or more"),
        (mask(BOX), {"extend": (1, 2, 3)}, "four margins"),
        (mask(BOX), {"extend": (0, 0, -3, 0)}, "four margins"),
        (mask(BOX), {"repeats": 0}, "repeats to be a whole number of 1 or more"),
        (mask(BOX), {"strength": 2.0}, "strength to be a finite number of 0 to 1"),
    ],
)
def test_bad_arguments(hole, options, message):
    with pytest.raises(UsageError, match=message):
        inpaint(shared("sd1"), an_image(), hole, "cat", **{**QUICK, **options})


@pytest.mark.parametrize("family", ["sd1", "inpaint"])
@pytest.mark.parametrize("only_masked", [False, True])
def test_an_image_of_one_pixel(family, only_masked):
    (image,) = inpaint(
        shared(family),
        an_image(1, 1),
        Image.new("L", (1, 1), 255),
        "cat",
        only_masked=only_masked,
        **{**QUICK, "steps": 1},
    )
    assert image.size == (1, 1)


def test_only_the_masked_part_is_worked_on_at_the_size_of_the_training(monkeypatch):
    pipe, shapes = shared("sd1"), []
    sample = pipe.sample
    monkeypatch.setattr(pipe, "sample", lambda plan, shape, start: shapes.append(shape) or sample(plan, shape, start))
    source = an_image(300, 200)
    (image,) = inpaint(pipe, source, mask((100, 190, 110, 200), 300, 200), "cat", only_masked=True, padding=10, **QUICK)
    assert shapes == [(4, 8, 8)]
    rows, columns = changed(image, source).nonzero()
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (190, 199, 100, 109)


def test_outpainting():
    source = an_image(40, 30)
    (image,) = inpaint(shared("sd1"), source, None, "cat", extend=(8, 0, 16, 5), **QUICK)
    assert image.size == (64, 35)
    assert apart(image.crop((8, 0, 48, 30)), source) == 0
    (both,) = inpaint(shared("sd1"), source, mask((0, 0, 4, 4), 40, 30), "cat", extend=(8, 0, 16, 5), **QUICK)
    difference = changed(both.crop((8, 0, 48, 30)), source)
    assert difference[:4, :4].any() and not difference[4:].any() and not difference[:, 4:].any()


@pytest.mark.parametrize("family", ["sd1", "inpaint"])
def test_an_image_does_not_depend_on_its_batch(family):
    together = inpaint(shared(family), an_image(), mask(BOX), "cat", num_images=3, sampler="ddpm", **QUICK)
    (alone,) = inpaint(shared(family), an_image(), mask(BOX), "cat", sampler="ddpm", **{**QUICK, "seed": 5})
    assert apart(together[2], alone) <= 1
    assert apart(together[0], together[1]) > 3


@pytest.mark.parametrize("sampler", ["ddim", "dpmpp-2m", "ddpm"])
def test_steps_taken_several_times(sampler):
    pipe, ways = shared("sd1"), []
    options = {**QUICK, "sampler": sampler, "progress": False}
    (image,) = inpaint(
        pipe, an_image(), mask(BOX), "cat", repeats=3, callback=lambda step, t, x0: ways.append(t), **options
    )
    downs = (
        pipe.schedule.timesteps(4, "leading") if sampler != "dpmpp-2m" else sorted({t for t in ways if t}, reverse=True)
    )
    assert len(ways) == 4 * 5 and ways[::5] == ways[2::5] == ways[4::5] == downs
    assert not changed(image, an_image())[np.asarray(mask(BOX)) == 0].any()
    (once,) = inpaint(pipe, an_image(), mask(BOX), "cat", **options)
    assert apart(image, once) > 3


def test_a_step_back_up_keeps_the_distribution():
    """Noised data stay what they are at the level reached: unit normal data stay unit normal."""
    low, high = Level(100.0, 0.8), Level(500.0, 0.3)
    draws = torch.randn(2, 200_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x0 = 2.0
    x, state = down_or_up(None, None, low.alpha * x0 + low.sigma * draws[0], low, high, "history", lambda: draws[1])
    assert state is None
    assert x.mean().item() == pytest.approx(high.alpha * x0, abs=0.01)
    assert x.std().item() == pytest.approx(high.sigma, abs=0.01)


def test_guidance_can_be_off():
    (image,) = inpaint(shared("inpaint"), an_image(), mask(BOX), "cat", guidance_scale=1.0, **QUICK)
    assert changed(image, an_image()).any()


def test_the_callback_cancels():
    with pytest.raises(Cancelled, match="after step 2 of 4"):
        inpaint(shared("sd1"), an_image(), mask(BOX), "cat", callback=lambda step, t, x0: step < 1, **QUICK)


@pytest.mark.parametrize("family", ["sd1", "inpaint"])
def test_the_recipe_makes_the_image_again(tmp_path, family):
    save_png(an_image(40, 40), tmp_path / "a.png")
    save_png(mask((8, 8, 20, 20), 40, 40), tmp_path / "m.png")
    sources = {"image": tmp_path / "a.png", "mask": tmp_path / "m.png"}
    (image,) = inpaint(
        shared(family),
        *sources.values(),
        "cat",
        grow=2,
        blur=1.5,
        only_masked=True,
        padding=4,
        extend=(0, 8, 0, 0),
        **QUICK,
    )
    recipe = read_recipe(image.info)
    assert recipe.task == "inpaint" and {role: entry["file"] for role, entry in recipe.sources.items()} == {
        "image": "a.png", "mask": "m.png",
    }  # fmt: skip
    assert apart(TASKS["inpaint"](shared(family), recipe, sources), image) == 0


def test_cells_beyond_the_image_count_what_lies_inside():
    cells = latent_mask(mask((8, 8, 9, 9), 9, 9), 8)
    assert torch.equal(cells[0, 0], torch.tensor([[0.0, 0.0], [0.0, 1.0]]))


def test_removing_begins_from_the_surroundings():
    source, hole = Image.new("RGB", (64, 64), (200, 40, 90)), mask(BOX)
    source.paste((0, 255, 0), BOX)
    (bare,) = inpaint(shared("sd1"), source, hole, "", remove=True, strength=0.0, **QUICK)
    assert np.array_equal(pixels(bare), pixels(Image.new("RGB", (64, 64), (200, 40, 90))))
    (result,) = inpaint(shared("sd1"), source, hole, "", remove=True, **QUICK)
    (other,) = inpaint(shared("sd1"), bare, hole, "", strength=0.5, **QUICK)
    assert np.array_equal(pixels(result), pixels(other))
    assert read_recipe(dict(result.info)).task_settings["strength"] == 0.5


def test_removing_everything_is_refused():
    with pytest.raises(UsageError, match="leaves something"):
        inpaint(shared("sd1"), an_image(), mask((0, 0, 64, 64)), "", remove=True, **QUICK)


def test_the_fill_goes_smoothly_from_rim_to_rim():
    ramp = Image.fromarray(np.repeat(np.arange(0, 256, 4, dtype=np.uint8)[None, :, None], 64, 0).repeat(3, 2))
    found = pixels(filled(ramp, mask(BOX))).astype(int)
    assert np.abs(found - pixels(ramp)).max() < 40
    assert (np.diff(found[40, :, 0]) >= -1).all()
    odd, hole = an_image(61, 43), mask((10, 20, 30, 29), 61, 43)
    kept = np.asarray(hole) == 0
    assert np.array_equal(pixels(filled(odd, hole))[kept], pixels(odd)[kept])
