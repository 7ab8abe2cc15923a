"""Wrong calls of the public functions end in one line."""

from __future__ import annotations

import pytest
from PIL import Image

from latentdiff.errors import UsageError
from latentdiff.recipe import read_recipe
from latentdiff.request.calls import OTHERWISE, SAME
from latentdiff.tasks import image_to_image, inpaint, interpolate, invert, restore, translate
from tests import peers

PLACES = {
    "pipe": lambda pipe, **options: pipe("a cat", **options),
    "image_to_image": lambda pipe, **options: image_to_image(pipe, "none.png", "a cat", **options),
    "inpaint": lambda pipe, **options: inpaint(pipe, "none.png", "mask.png", "a cat", **options),
    "interpolate": lambda pipe, **options: interpolate(pipe, ["a cat", "a dog"], **options),
    "restore": lambda pipe, **options: restore(pipe, "none.png", None, **options),
    "translate": lambda pipe, **options: translate(pipe, "none.png", "a cat", **options),
    "invert": lambda pipe, **options: invert(pipe, "none.png", **options),
}


@pytest.fixture(scope="module")
def pipe():
    return peers.ours("sd1")


@pytest.mark.parametrize("place", PLACES)
def test_unknown_options_name_the_nearest(place, pipe):
    with pytest.raises(UsageError, match=r"^there is no option 'stepz'; did you mean 'steps'\?$"):
        PLACES[place](pipe, stepz=3)
    with pytest.raises(UsageError, match="^there is no option 'qqqqq'; expected one of .*progress"):
        PLACES[place](pipe, qqqqq=3)


@pytest.mark.parametrize("place", PLACES)
def test_wrong_types_are_refused_before_anything_is_done(place, pipe):
    with pytest.raises(UsageError, match="expected guidance_scale to be a finite number, found 'strong'"):
        PLACES[place](pipe, guidance_scale="strong")
    with pytest.raises(UsageError, match="expected steps to be a whole number of 1 or more, found '5'"):
        PLACES[place](pipe, steps="5")


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", OTHERWISE)
def test_names_of_diffusers_are_answered_with_ours(place, name, pipe):
    with pytest.raises(UsageError, match=f"there is no option '{name}'"):
        PLACES[place](pipe, **{name: None})


def test_names_of_diffusers_with_our_meaning_are_taken(pipe):
    images = pipe("cat", num_inference_steps=2, num_images_per_prompt=2, seed=1, progress=False)
    assert [read_recipe(image.info).steps for image in images] == [2, 2]
    assert set(SAME) == {"num_inference_steps", "num_images_per_prompt", "mask_image"}
    with pytest.raises(UsageError, match="'num_inference_steps' is another name of 'steps'; give one of the two"):
        pipe("cat", num_inference_steps=2, steps=2)


def test_missing_and_surplus_arguments(pipe):
    with pytest.raises(UsageError, match="expected a prompt, or prompt_embeds in its place; found neither"):
        pipe()
    with pytest.raises(UsageError, match="image_to_image: missing a required argument: 'image'"):
        image_to_image(pipe)
    with pytest.raises(UsageError, match="too many positional arguments"):
        pipe("a cat", 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda pipe: image_to_image(pipe, "none.png", "a", strength=2), "strength to be a finite number of 0 to 1"),
        (lambda pipe: image_to_image(pipe, "none.png", "a", width=0), "width to be a whole number of 1 or more"),
        (lambda pipe: inpaint(pipe, "none.png", None, "a", repeats=0), "repeats to be a whole number of 1 or more"),
        (lambda pipe: interpolate(pipe, ["a", "b"], frames=1), "frames to be a whole number of 2 or more"),
        (lambda pipe: translate(pipe, "none.png", "a", method="x"), "method to be one of features"),
        (lambda pipe: invert(pipe, "none.png", method="x"), "method to be one of fixed-point"),
        (lambda pipe: invert(pipe, "none.png", iterations=-1), "iterations to be a whole number of 0 or more"),
        (lambda pipe: pipe(5), "expected a prompt or a list of prompts, found int: 5"),
        (lambda pipe: image_to_image(pipe, Image.new("RGB", (8, 8)), 5), "a list of prompts, found int: 5"),
        (lambda pipe: pipe("a", output="np"), "output to be one of images, latents, found 'np'"),
        (lambda pipe: pipe("a", latents="noise"), "latents to be a tensor"),
    ],
)
def test_other_arguments_are_checked_too(pipe, call, message):
    with pytest.raises(UsageError, match=message):
        call(pipe)


def test_no_negative_prompt_is_the_empty_one(pipe):
    given, none = (pipe("cat", steps=1, seed=0, progress=False, **own)[0] for own in ({}, {"negative_prompt": None}))
    assert given.tobytes() == none.tobytes() and read_recipe(none.info).negative_prompt == ""
