"""Regions: against images of that size made in diffusers, closed forms of their maps, and what is refused."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from latentdiff import ControlNet, Region, image_to_image, inpaint
from latentdiff.adapters.control.regions import regions_again
from latentdiff.errors import DataError, UsageError
from latentdiff.networks.regional import Regions
from latentdiff.recipe import read_recipe
from tests import peers
from tests.adapters.control.nets import hint, saved
from tests.tasks.images import an_image, apart, mask

QUICK = {"steps": 3, "seed": 1, "sampler": "ddim", "progress": False}
shared = cache(peers.ours)


@pytest.mark.parametrize("family", ["sd1", "sd2", "xl"])
def test_halves_alone_are_images_of_half_the_width_in_diffusers(family):
    """Each region of weight 1 sees nothing of the other, so each is what its prompt draws at its size from its noise."""
    pipe, theirs = shared(family), peers.theirs(family)
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(5))
    sides = {"left": ("the cat", slice(0, 8)), "right": ("a red dog", slice(8, 16))}
    told = {"original_size": (128, 128), "target_size": (128, 128)} if family == "xl" else {}
    expected = [
        theirs(
            text, negative_prompt="blue fox", num_inference_steps=3, guidance_scale=5.0, output_type="latent",
            height=128, width=64, latents=noise[..., columns].clone(), **told,
        ).images
        for text, columns in sides.values()
    ]  # fmt: skip
    regions = [Region(text, box=place, weight=1.0) for place, (text, _) in sides.items()]
    options = {**QUICK, "negative_prompt": "blue fox", "latents": noise, "output": "latents"}
    found = pipe("a photo", regions=regions, **options)
    torch.testing.assert_close(found, torch.cat(expected, dim=3), rtol=1e-3, atol=1e-3)
    assert (found - pipe("a photo", **options)).abs().max() > 0.01


@pytest.mark.parametrize("options", [{}, {"guidance_kind": "apg"}, {"pag_scale": 3.0}, {"cache_interval": 2}, {"hires": 1.5}])
@pytest.mark.parametrize("family", ["sd1", "xl"])
def test_one_region_over_all_is_the_plain_image(family, options):
    pipe = shared(family)
    plain = pipe("cat", **QUICK, **options)[0]
    for common, regions in {
        "cat": [Region("cat", box=(0, 0, 1, 1), weight=1.0)],
        "dog": [Region("cat", mask=Image.new("L", (8, 8), 255), weight=1.0)],
    }.items():
        assert np.array_equal(pipe(common, regions=regions, **QUICK, **options)[0], plain)


def test_the_cache_keeps_each_region_apart():
    pipe, options = shared("sd1"), {**QUICK, "steps": 6, "cache_interval": 3, "output": "latents"}
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(5))
    sides = {"left": noise[..., :8], "right": noise[..., 8:]}
    expected = torch.cat([pipe("cat", latents=part, **options) for part in sides.values()], dim=3)
    regions = [Region("cat", box=place, weight=1.0) for place in sides]
    torch.testing.assert_close(pipe("a", regions=regions, latents=noise, **options), expected, rtol=1e-4, atol=1e-4)


@given(st.lists(st.tuples(*[st.floats(0, 0.9)] * 2, *[st.floats(0.05, 1)] * 2, st.floats(0.1, 2)), min_size=1, max_size=4))
def test_shares_add_up_to_one(boxes):
    regions = [
        Region("a", box=(x, y, min(1.0, x + width), min(1.0, y + height)), weight=weight)
        for x, y, width, height, weight in boxes
    ]
    maps = [region.map(7, 9) for region in regions]
    for region, found, (*_, weight) in zip(regions, maps, boxes, strict=True):
        x0, y0, x1, y1 = region.box
        torch.testing.assert_close(found.mean().item(), weight * (x1 - x0) * (y1 - y0), rtol=1e-9, atol=1e-12)
    applied = Regions.of(maps, [torch.zeros(1, 2, 3)] * len(maps), 4)
    total = torch.zeros(1, 1, 7, 9) if applied.common is None else applied.common.clone()
    for one in applied.regions:
        one.view.of(total).add_(one.view.share)
        assert min(one.view.share.shape[-2:]) >= 4
    torch.testing.assert_close(total, torch.ones_like(total))


def test_places_in_words_and_masks():
    boxes = {
        "left": (0, 0, 0.5, 1), "top left": (0, 0, 0.5, 0.5), "bottom-right": (0.5, 0.5, 1, 1),
        "center": (0.25, 0.25, 0.75, 0.75), "top centre": (0.25, 0, 0.75, 0.5), "center left": (0, 0.25, 0.5, 0.75),
    }  # fmt: skip
    assert {words: Region("a", box=words).box for words in boxes} == boxes
    grey = Image.new("L", (64, 64), 51)
    assert torch.equal(Region("a", mask=grey, weight=1.0).map(4, 4), torch.full((4, 4), 0.2, dtype=torch.float64))
    half = mask((0, 0, 32, 64))
    assert torch.equal(Region("a", mask=half).map(8, 8), Region("a", box="left").map(8, 8))
    part = (16, 0, 48, 64), (64, 64)
    for region in (Region("a", mask=half), Region("a", box="left")):
        assert torch.equal(region.cropped(*part).map(8, 4), Region("a", box="left").map(8, 4))


def test_recipes_and_tasks(tmp_path):
    pipe = shared("sd1")
    half = tmp_path / "half.png"
    mask((0, 0, 32, 64)).save(half)
    control = ControlNet.load(saved(tmp_path))(hint())
    regions = [Region("dog", mask=half, weight=1.0), Region("red fox", box="top right")]
    options = {**QUICK, "regions": regions, "num_images": 2, "batch_size": 2, "controls": [control]}
    image, area = an_image(), mask((8, 8, 40, 40))
    made = {
        "generate": lambda **given: pipe("cat", **given),
        "edit": lambda **given: image_to_image(pipe, image, "cat", strength=0.7, **given),
        "inpaint": lambda **given: inpaint(pipe, image, area, "cat", **given),
        "cutout": lambda **given: inpaint(pipe, image, area, "cat", only_masked=True, padding=4, **given),
    }
    for make in made.values():
        first, second = make(**options)
        recipe = read_recipe(first.info)
        assert recipe.roles()["region_mask1"]["file"] == "half.png"
        again = regions_again(recipe.regions, {"region_mask1": half}.__getitem__)
        assert [one.describe() for one in again] == recipe.regions
        repeated = make(**{**options, "regions": again, "num_images": 1})[0]
        assert apart(repeated, first) <= 1 and apart(first, second) > 0
        assert apart(make(**{**options, "regions": []})[0], first) > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"box": (0.5, 0, 1.5, 1)}, "within the image.*found 0.5,0,1.5,1"),
        ({"box": (0.5, 0, 0.5, 1)}, "within the image"),
        ({"box": (float("nan"), 0, 1, 1)}, "within the image"),
        ({"box": (0.5, 1)}, "four numbers x0,y0,x1,y1 or as words, found \\(0.5, 1\\)"),
        ({"box": "left right"}, "or two of them as in 'top left', found 'left right'"),
        ({"box": "middle"}, "found 'middle'"),
        ({}, "a box or a mask for the region 'a', found neither"),
        ({"box": "left", "mask": Image.new("L", (8, 8), 255)}, "found both"),
        ({"mask": Image.new("L", (8, 8))}, "is black all over"),
        ({"box": "left", "weight": 0}, "a weight above 0"),
        ({"box": "left", "weight": -1}, "weight to be a finite number of 0 or more"),
    ],
)
def test_places_that_are_none(options, message):
    with pytest.raises(UsageError, match=message):
        Region("a", **options)


def test_what_does_not_go_together():
    pipe, left = shared("sd1"), Region("dog", box="left")
    fine = Image.new("L", (4096, 4096))
    fine.putpixel((0, 0), 255)
    for prompt, options, message in [
        ("cat AND dog", {"regions": [left]}, "prompts without AND"),
        ("cat", {"regions": [Region("dog AND fox", box="left")]}, "expected a prompt without AND"),
        ("cat", {"regions": [left], "seamless": "x"}, "regions do not go with seamless"),
        ("cat", {"regions": [left], "window": 64, "width": 128}, "regions do not go with window"),
        ("cat", {"regions": [Region("a", mask=Image.new("L", (64, 32), 255))]}, "proportions.*64 x 64 pixels, found 64 x 32"),
        ("cat", {"regions": [Region("a", mask=fine)]}, "too fine for an image of 64 x 64 pixels"),
        ("cat", {"regions": ["left"]}, 'expected regions to be regions=\\[Region\\("a cat", box="left"\\)\\]'),
    ]:
        with pytest.raises(UsageError, match=message):
            pipe(prompt, **options, **QUICK)
    with pytest.raises(DataError, match=r"nothing\.png"):
        Region("a", mask="nothing.png")
