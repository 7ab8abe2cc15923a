import numpy as np
import pytest
from PIL import Image, ImageOps

from latentdiff.training.data.transforms import prepare
from tests.training.data.build import an_image


def test_an_image_that_fits_is_left_alone():
    assert np.array_equal(prepare(an_image(), (16, 12)), np.asarray(an_image()))


@pytest.mark.parametrize("size", [(40, 30), (41, 17), (9, 33)])
def test_center_crop_is_that_of_pillow(size):
    image = an_image(size=size)
    expected = ImageOps.fit(image, (8, 8), Image.Resampling.LANCZOS)
    assert np.array_equal(prepare(image, (8, 8)), np.asarray(expected))


def test_crop_without_scaling_copies_pixels():
    image = an_image(size=(33, 16))
    assert np.array_equal(prepare(image, (16, 16)), np.asarray(image)[:, 8:24])
    whole = np.asarray(image)
    for number in range(10):
        part = prepare(image, (16, 16), (number,))
        assert any(np.array_equal(part, whole[:, left : left + 16]) for left in range(18))


def test_random_crops_follow_their_key():
    image = an_image(size=(64, 16))
    crops = [prepare(image, (16, 16), (number,)).tobytes() for number in (0, 0, 1, 2)]
    assert crops[0] == crops[1] and len(set(crops)) == 3


def test_sides():
    assert prepare(an_image(size=(50, 20)), (24, 8)).shape == (8, 24, 3)
    assert prepare(an_image(size=(20000, 100)), (128, 64)).shape == (64, 128, 3)
