from __future__ import annotations

import io
import json

import numpy as np
import pytest
from PIL import Image, ImageFilter, ImageOps

from latentdiff.training.report.memorization import check_copies, nearest_images, read_copy_check


def an_image(seed: int, size: int = 96) -> Image.Image:
    """A smooth random image."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC)


TRAINING = [an_image(seed) for seed in range(30)]


def compressed(image: Image.Image) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=30)
    return Image.open(buffer).convert("RGB")


DISGUISES = {
    "as it is": lambda image: image,
    "mirrored": ImageOps.mirror,
    "compressed": compressed,
    "blurred": lambda image: image.filter(ImageFilter.GaussianBlur(3)),
    "smaller and paler": lambda image: Image.blend(image, Image.new("RGB", image.size, "gray"), 0.4).resize((64, 64)),
}


@pytest.mark.parametrize("disguise", DISGUISES)
def test_a_pasted_training_image_is_found(tmp_path, disguise):
    path = tmp_path / "samples/00.png"
    path.parent.mkdir()
    DISGUISES[disguise](TRAINING[17]).save(path)
    check = check_copies(tmp_path, [path], [f"{i}.png" for i in range(30)], TRAINING.__getitem__, range(30))
    (found,) = check.nearest
    assert found.training == "17.png" and found.suspicious and check.suspicious == 1
    assert found.mirrored == (disguise == "mirrored")


def test_new_images_are_not_flagged(tmp_path):
    paths = [tmp_path / f"{seed}.png" for seed in range(100, 120)]
    for seed, path in enumerate(paths, start=100):
        an_image(seed).save(path)
    check = check_copies(tmp_path, paths, [f"{i}.png" for i in range(30)], TRAINING.__getitem__, range(30))
    assert check.suspicious == 0


def test_one_colour_for_another_thing_is_no_copy():
    """Plain images, of which all features are noise, are near nothing."""
    plain = Image.new("RGB", (96, 96), (10, 200, 30))
    (found,), usual = nearest_images([plain], TRAINING.__getitem__, range(30))
    assert found[1] > 0.5 * usual


def test_a_shared_background_is_no_copy():
    """Two things at different places on one strong colour have little in common."""

    def scene(left: int, thing: tuple[int, int, int]) -> Image.Image:
        image = Image.new("RGB", (96, 96), (245, 138, 31))
        image.paste(thing, (left, left, left + 30, left + 30))
        return image

    training = [*TRAINING, scene(5, (30, 30, 200))]
    (found,), usual = nearest_images([scene(55, (200, 30, 30))], training.__getitem__, range(31))
    assert found[1] > 0.5 * usual


def test_duplicates_in_the_data_do_not_lower_the_threshold():
    doubled = TRAINING + TRAINING
    _, usual = nearest_images([TRAINING[0]], TRAINING.__getitem__, range(30))
    _, with_duplicates = nearest_images([TRAINING[0]], doubled.__getitem__, range(60))
    assert with_duplicates == pytest.approx(usual)


def test_one_training_image_is_enough_to_find_its_copy(tmp_path):
    TRAINING[0].save(tmp_path / "copy.png")
    an_image(99).save(tmp_path / "new.png")
    check = check_copies(tmp_path, [tmp_path / "copy.png", tmp_path / "new.png"], ["a"], TRAINING.__getitem__, [0])
    assert [one.suspicious for one in check.nearest] == [True, False]


def test_what_is_written_is_read_again(tmp_path):
    TRAINING[3].save(tmp_path / "sample.png")
    check = check_copies(
        tmp_path, [tmp_path / "sample.png"], [f"{i}.png" for i in range(30)], TRAINING.__getitem__, range(20)
    )
    assert read_copy_check(tmp_path) == check
    assert (check.compared, check.training_images) == (20, 30)
    with Image.open(tmp_path / check.nearest[0].thumbnail) as thumbnail:
        assert np.abs(np.asarray(thumbnail, dtype=int) - np.asarray(TRAINING[3], dtype=int)).max() == 0
    assert json.loads((tmp_path / "copying/copying.json").read_text())["space"].startswith("32x32 pixels")
    assert read_copy_check(tmp_path / "elsewhere") is None
