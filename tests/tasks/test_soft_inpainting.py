"""Soft painting against image to image, which it is where the mask is grey all over."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from PIL import Image

from latentdiff.errors import UsageError
from latentdiff.image import to_pil, to_tensor
from latentdiff.recipe import read_recipe
from latentdiff.tasks import TASKS, image_to_image, inpaint
from tests import peers
from tests.tasks.images import an_image, apart, mask, pixels

shared = cache(peers.ours)
QUICK = {"steps": 5, "seed": 3, "sampler": "ddim", "progress": False}


def grey(value: int) -> Image.Image:
    return Image.new("L", (64, 64), value)


@pytest.mark.parametrize(("value", "strength"), [(255, 1.0), (204, 0.8), (103, 0.4), (60, 0.2)])
def test_one_grey_all_over_is_image_to_image(value, strength):
    expected = image_to_image(shared("sd1"), an_image(), "cat", strength=strength, **QUICK)[0]
    found = inpaint(shared("sd1"), an_image(), grey(value), "cat", soft=True, **QUICK)[0]
    if strength == 1.0:  # painting begins in pure noise there
        expected = inpaint(shared("sd1"), an_image(), grey(255), "cat", **QUICK)[0]
    if value * 4 < 255:  # the image's pixels are mixed in at the darkest places
        expected = Image.blend(an_image(), expected, value * 4 / 255)
    assert apart(found, expected) <= 1


def test_brighter_places_go_further():
    ramp = Image.fromarray(np.tile(np.linspace(70, 255, 64).astype(np.uint8), (64, 1)))
    found = inpaint(shared("sd1"), an_image(), ramp, "cat", soft=True, **{**QUICK, "steps": 8})[0]
    (through_vae,) = to_pil(shared("sd1").decode(shared("sd1").encode_images(to_tensor([an_image()])).mode()))
    change = np.abs(pixels(found) - pixels(through_vae)).mean((0, 2))
    assert change[:16].mean() < change[48:].mean()


def test_black_keeps_every_pixel():
    box = (16, 16, 48, 48)
    found = inpaint(shared("sd1"), an_image(), mask(box), "cat", soft=True, **QUICK)[0]
    inside = np.zeros((64, 64), bool)
    inside[16:48, 16:48] = True
    assert (pixels(found)[~inside] == pixels(an_image())[~inside]).all()
    assert apart(found.crop(box), an_image().crop(box)) > 20


def test_the_recipe_makes_it_again(tmp_path):
    an_image().save(tmp_path / "p.png")
    grey(150).save(tmp_path / "m.png")
    (image,) = inpaint(shared("sd1"), tmp_path / "p.png", tmp_path / "m.png", "cat", soft=True, blur=2.0, **QUICK)
    recipe = read_recipe(image.info)
    assert recipe.task_settings["soft"] is True
    again = TASKS["inpaint"](shared("sd1"), recipe, {"image": tmp_path / "p.png", "mask": tmp_path / "m.png"})
    assert apart(again, image) == 0


def test_a_model_for_inpainting_is_refused():
    with pytest.raises(UsageError, match="no model for inpainting with soft"):
        inpaint(shared("inpaint"), an_image(), grey(200), "cat", soft=True, **QUICK)
