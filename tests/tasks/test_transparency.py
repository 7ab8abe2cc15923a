"""What the model does not see of an image stays: transparent pixels, and the meaning of colours."""

from __future__ import annotations

import io
from functools import cache

import numpy as np
import pytest
from PIL import Image, ImageCms

from latentdiff.image import open_image, save_image
from latentdiff.reading.colours import colours_of
from latentdiff.recipe import read_recipe
from latentdiff.tasks import TASKS, image_to_image, inpaint, invert
from latentdiff.tasks.transparency import finished
from tests import peers
from tests.reading.image_kinds import adobe_profile, adobe_to_srgb
from tests.tasks.images import an_image, mask, pixels

shared = cache(peers.ours)
QUICK = {"steps": 2, "seed": 3, "progress": False}
HOLE = mask((8, 8, 24, 32))


def half_clear(size: tuple[int, int] = (64, 64)) -> Image.Image:
    """Clear on the left, half in the middle, opaque on the right."""
    image = an_image(*size)
    alpha = np.repeat([0, 128, 255], [16, 16, size[0] - 32]).astype(np.uint8)
    image.putalpha(Image.fromarray(np.tile(alpha, (size[1], 1))))
    return image


@pytest.mark.parametrize("options", [{}, {"only_masked": True}, {"remove": True}, {"strength": 0.0}])
def test_no_pixel_changes_outside_the_mask(options):
    source = half_clear()
    (result,) = inpaint(shared("sd1"), source, HOLE, "cat", **QUICK, **options)
    painted = np.asarray(HOLE) == 255
    assert result.mode == "RGBA"
    assert np.array_equal(pixels(result)[~painted], pixels(source)[~painted])  # colours under clear parts too
    assert (pixels(result)[painted][:, 3] == 255).all()
    plain = Image.alpha_composite(Image.new("RGBA", (64, 64), "white"), source).convert("RGB")
    (opaque,) = inpaint(shared("sd1"), plain, HOLE, "cat", **QUICK, **options)
    assert np.array_equal(pixels(result)[painted][:, :3], pixels(opaque)[painted])


def test_a_soft_mask_makes_it_opaque_by_and_by():
    (result,) = inpaint(shared("sd1"), half_clear(), Image.new("L", (64, 64), 51), "cat", **QUICK)
    before = pixels(half_clear())[..., 3]
    assert np.abs(pixels(result)[..., 3] - (before + 0.2 * (255 - before))).max() <= 0.5


def test_beyond_the_border(tmp_path):
    (result,) = inpaint(shared("sd1"), half_clear(), None, "cat", extend=(8, 0, 0, 8), **QUICK)
    assert result.size == (72, 72)
    assert np.array_equal(pixels(result)[:64, 8:], pixels(half_clear()))
    assert (pixels(result)[64:, :, 3] == 255).all() and (pixels(result)[:, :8, 3] == 255).all()


def test_an_edited_image_is_as_transparent_as_it_was(tmp_path):
    source = half_clear()
    (kept,) = image_to_image(shared("sd1"), source, "cat", strength=0.0, **QUICK)
    alpha = pixels(source)[..., 3]
    assert np.array_equal(pixels(kept)[..., 3], alpha)
    assert np.abs(pixels(kept) - pixels(source))[alpha == 255].max() == 0
    assert np.abs(pixels(kept) - pixels(source))[alpha == 128].max() <= 2  # of which half the levels are seen
    (result,) = image_to_image(shared("sd1"), source, "cat", strength=0.5, width=32, **QUICK)
    assert result.size == (32, 32) and result.mode == "RGBA" and result.getextrema()[3] == (0, 255)
    save_image(source, tmp_path / "a.webp", quality=100)
    (made,) = image_to_image(shared("sd1"), tmp_path / "a.webp", "cat", strength=0.5, **QUICK)
    again = TASKS["edit"](shared("sd1"), read_recipe(made.info), {"image": tmp_path / "a.webp"})
    assert again.mode == "RGBA" and again.tobytes() == made.tobytes()


def test_on_white_a_result_looks_as_the_model_left_it():
    source = half_clear()
    left = Image.fromarray((pixels(source)[..., :3] // 4 + 190).astype(np.uint8))
    result = finished(left, colours_of(source))
    shown = Image.alpha_composite(Image.new("RGBA", (64, 64), "white"), result)
    seen = pixels(source)[..., 3] > 0
    assert np.abs(pixels(shown)[..., :3] - pixels(left))[seen].max() <= 1


def test_the_profile_says_what_the_colours_are(tmp_path):
    source = Image.new("RGB", (64, 64), (120, 140, 90))
    source.info["icc_profile"] = adobe_profile()
    (result,) = inpaint(shared("sd1"), source, HOLE, "cat", **QUICK)
    kept = pixels(result)[np.asarray(HOLE) == 0]
    assert np.abs(kept - adobe_to_srgb((120, 140, 90))).max() <= 1
    save_image(result, tmp_path / "a.png")
    again = open_image(tmp_path / "a.png")
    profile = ImageCms.getOpenProfile(io.BytesIO(again.info["icc_profile"]))
    assert "sRGB" in ImageCms.getProfileDescription(profile)
    assert read_recipe(again.info) == read_recipe(result.info)
    (plain,) = inpaint(shared("sd1"), an_image(), HOLE, "cat", **QUICK)
    assert "icc_profile" not in plain.info


def test_other_tasks_say_that_it_lies_on_white():
    with pytest.warns(UserWarning, match="transparent parts of the image are laid on white"):
        invert(shared("sd1"), half_clear(), steps=1, measure=False, progress=False)
