import io

import numpy as np
from PIL import Image

from latentdiff.training.data.duplicates import look_at, near, same, shared
from tests.training.data.build import an_image, encoded


def looks(*images):
    return [look_at(image) for image in images]


def jpeg(image):
    return Image.open(io.BytesIO(encoded(image, "JPEG", quality=85))).convert("RGB")


def big(seed):
    return an_image(seed, (128, 96))


def test_equal_pixels():
    assert same(looks(big(0), big(1), big(0), big(2), big(1))) == [[0, 2], [1, 4]]
    assert same(looks(an_image(0, (16, 12)), Image.fromarray(np.asarray(an_image(0, (16, 12))).reshape(16, 12, 3)))) == []


def test_nearly_equal():
    images = [big(number) for number in range(40)]
    copies = [jpeg(big(3)), big(5).resize((64, 48)), Image.blend(big(7), Image.new("RGB", (128, 96), "grey"), 0.03)]
    assert near(looks(*images, *copies)) == [[3, 40], [5, 41], [7, 42]]


def test_equal_images_are_not_listed_twice():
    assert near(looks(big(0), big(0), big(1))) == []
    assert near(looks(big(0), big(0), jpeg(big(0)))) == [[0, 2]]


def test_flat_images_of_other_colours_are_not_alike():
    flat = [Image.new("RGB", (20, 20), colour) for colour in ("red", "blue", "#ff0100", "black")]
    assert near(looks(*flat)) == [[0, 2]]


def test_shared_between_two_sets():
    training, held_out = looks(big(0), big(1), big(2)), looks(big(9), jpeg(big(1)), big(0), big(8))
    assert shared(training, held_out) == [(1, 1), (0, 2)]
