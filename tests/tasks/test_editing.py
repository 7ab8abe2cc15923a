from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from PIL import Image

from latentdiff.diffusion.denoise import Cancelled
from latentdiff.errors import DataError, UsageError
from latentdiff.image import save_png, to_pil, to_tensor
from latentdiff.recipe import read_recipe
from latentdiff.request.plan import Sampling
from latentdiff.tasks import TASKS, image_to_image
from latentdiff.tasks.editing import begin_at
from tests import peers
from tests.tasks.images import SCHEDULERS, an_image, apart, in_diffusers, pixels

shared = cache(peers.ours)
QUICK = {"steps": 4, "seed": 3, "progress": False}


@pytest.mark.parametrize("strength", [0.3, 0.58, 1.0])
@pytest.mark.parametrize(
    ("family", "sampler"),
    [("sd1", "ddim"), ("sd2", "ddim"), ("sd1", "euler"), ("sd1", "dpmpp-2m"), ("xl", "ddim"), ("xl", "euler")],
)
def test_same_image_as_diffusers(family, sampler, strength):
    source, spacing = an_image(), SCHEDULERS[sampler][1]
    expected = in_diffusers(
        "edit", family, sampler, [7, 8], prompt="a photo of the cat", negative_prompt="red fox", image=source,
        strength=strength, num_inference_steps=10, guidance_scale=5.0,
    )  # fmt: skip
    images = image_to_image(
        shared(family), source, "a photo of the cat", negative_prompt="red fox", strength=strength, steps=10,
        sampler=sampler, spacing=spacing, seed=7, num_images=2, progress=False,
    )  # fmt: skip
    assert expected.std() > 20
    assert all(apart(image, other) <= 1 for image, other in zip(images, expected, strict=True))


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_later_noise_is_that_of_diffusers_too(sampler):
    options = {"eta": 1.0} if sampler == "ddim" else {}
    expected = in_diffusers(
        "edit", "sd1", sampler, [5], prompt="cat", image=an_image(), strength=0.8, num_inference_steps=5, guidance_scale=5.0,
        **options,
    )  # fmt: skip
    (image,) = image_to_image(
        shared("sd1"), an_image(), "cat", strength=0.8, steps=5, sampler=sampler, seed=5, progress=False, **options
    )
    assert apart(image, expected[0]) <= 1


def test_steps_are_counted_as_in_diffusers():
    pipe = shared("sd1")
    for steps, strength in [(50, 0.58), (10, 0.3), (25, 0.6), (3, 1.0), (7, 0.999)]:
        seen = []
        image_to_image(
            pipe, an_image(8, 8), "", strength=strength, steps=steps, guidance_scale=1.0, seed=0, progress=False,
            callback=lambda step, t, x0, seen=seen: seen.append(t),
        )  # fmt: skip
        scheduler = SCHEDULERS["ddim"][0].from_config(
            {**peers.theirs("sd1").scheduler.config, "timestep_spacing": "leading"}
        )
        scheduler.set_timesteps(steps)
        assert seen == scheduler.timesteps[max(steps - min(int(steps * strength), steps), 0) :].tolist()


def test_strength_says_how_far_to_go():
    pipe, source = shared("sd1"), an_image()
    (through_vae,) = to_pil(pipe.decode(pipe.encode_images(to_tensor([source])).mode()))
    images = [image_to_image(pipe, source, "cat", strength=strength, **QUICK)[0] for strength in (0.25, 0.5, 1.0)]
    distances = [np.abs(pixels(image) - pixels(through_vae)).mean() for image in images]
    assert 0 < distances[0] < distances[1] < distances[2]


def test_strength_zero_gives_the_image_back():
    source = an_image(20, 13)
    images = image_to_image(shared("sd1"), source, "cat", strength=0.0, num_images=2, **QUICK)
    assert len(images) == 2 and all(apart(image, source) == 0 for image in images)
    assert read_recipe(images[1].info).seed == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strength": -0.1}, "strength to be a finite number of 0 to 1"),
        ({"strength": 1.5}, "strength to be a finite number of 0 to 1"),
        ({"strength": float("nan")}, "strength to be a finite number of 0 to 1"),
        ({"strength": 0.2}, "less than one step"),
        ({"width": 0}, "width to be a whole number of 1 or more"),
        ({"steps": 0}, "steps to be"),
        ({"seed": [1, 2]}, "one seed or 1"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(UsageError, match=message):
        image_to_image(shared("sd1"), an_image(8, 8), "cat", **{**QUICK, **options})


def test_missing_and_foreign_files(tmp_path):
    with pytest.raises(DataError, match="no image"):
        image_to_image(shared("sd1"), tmp_path / "none.png", "cat", **QUICK)
    (tmp_path / "a.png").write_text("text")
    with pytest.raises(DataError, match="cannot read"):
        image_to_image(shared("sd1"), tmp_path / "a.png", "cat", **QUICK)


@pytest.mark.parametrize("size", [(1, 1), (7, 30), (64, 40), (17, 8)])
def test_any_size_comes_back_as_it_was(size):
    (image,) = image_to_image(shared("sd1"), an_image(*size), "cat", **QUICK)
    assert image.size == size and image.mode == "RGB"
    recipe = read_recipe(image.info)
    assert (recipe.width, recipe.height) == size


def test_wanted_size_keeps_proportions():
    (image,) = image_to_image(shared("sd1"), an_image(40, 20), "cat", width=32, **QUICK)
    assert image.size == (32, 16)


def test_much_larger_images_are_warned_about():
    with pytest.warns(UserWarning, match="200 x 100 pixels and the model was trained on 64 x 64"):
        image_to_image(shared("sd1"), an_image(200, 100), "cat", **{**QUICK, "steps": 1, "strength": 1.0})


def test_exif_transparency_and_16_bits(tmp_path):
    upright = an_image(16, 24)
    turned = upright.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 270 degrees
    turned.save(tmp_path / "turned.png", exif=exif)
    clear = Image.new("RGBA", (16, 24), (255, 0, 0, 0))
    grey = Image.fromarray(np.full((24, 16), 40_000, np.uint16))
    flat = Image.new("RGB", (16, 24), (156, 156, 156))
    white = Image.new("RGB", (16, 24), "white")
    for given, same in [(tmp_path / "turned.png", upright), (clear, white), (grey, flat)]:
        first, second = (image_to_image(shared("sd1"), image, "cat", **QUICK)[0] for image in (given, same))
        assert first.size == (16, 24) and apart(first.convert("RGB"), second) == 0


def test_an_image_does_not_depend_on_its_batch():
    together = image_to_image(shared("sd1"), an_image(), "cat", num_images=3, sampler="ddpm", **QUICK)
    (alone,) = image_to_image(shared("sd1"), an_image(), "cat", sampler="ddpm", **{**QUICK, "seed": 5})
    assert apart(together[2], alone) <= 1
    assert apart(together[0], together[1]) > 3


def test_the_callback_cancels():
    seen = []
    with pytest.raises(Cancelled, match="after step 1 of 2"):
        image_to_image(
            shared("sd1"), an_image(), "cat", callback=lambda step, t, x0: seen.append(step) or False, **QUICK
        )
    assert seen == [0]


def test_inpainting_models_are_refused():
    with pytest.raises(UsageError, match="for inpainting"):
        image_to_image(shared("inpaint"), an_image(), "cat", **QUICK)


def test_the_recipe_makes_the_image_again(tmp_path):
    save_png(an_image(40, 40), tmp_path / "a.png")
    (image,) = image_to_image(
        shared("sd1"),
        tmp_path / "a.png",
        "cat",
        strength=0.5,
        width=24,
        negative_prompt="dog",
        sampler="ddim",
        eta=0.5,
        **QUICK,
    )
    recipe = read_recipe(image.info)
    assert recipe.task == "edit"
    unsaid = dict.fromkeys(("height", "inversion", "image_guidance_scale"))
    assert recipe.task_settings == {"strength": 0.5, "width": 24, **unsaid}
    assert recipe.sources["image"]["file"] == "a.png" and len(recipe.sources["image"]["sha256"]) == 64
    assert apart(TASKS["edit"](shared("sd1"), recipe, {"image": tmp_path / "a.png"}), image) == 0
    assert "Denoising strength: 0.5" in image.info["parameters"]


def test_images_in_memory_are_known_by_their_pixels():
    first, second = (
        read_recipe(image_to_image(shared("sd1"), an_image(8, 8, seed), "", **QUICK)[0].info).sources["image"]
        for seed in (0, 1)
    )
    assert first["file"] == "" and first["sha256"] != second["sha256"]
    assert pixels(an_image(8, 8, 0)).shape == (8, 8, 3)


@pytest.mark.parametrize("strength", [0.9, 0.6, 0.2])
@pytest.mark.parametrize("steps", [25, 40])
def test_strength_is_that_of_the_first_way_down(steps, strength):
    """Restart walks its last stretch again, which makes an edit no weaker."""
    schedule = shared("sd1").schedule
    whole = Sampling(sampler="restart", steps=steps, seed=1).plan("cat", schedule)
    plain = list(whole.levels)
    while (up := next((i for i in range(1, len(plain)) if plain[i].sigma_hat > plain[i - 1].sigma_hat), None)) is not None:
        back = next(i for i in range(up, len(plain)) if plain[i] == plain[up - 1])
        del plain[up : back + 1]
    cut = begin_at(whole, strength).levels
    taken = int((len(plain) - 1) * strength)
    assert len(plain) < len(whole.levels) and cut[0] == plain[len(plain) - 1 - taken]
    assert cut[-1] == whole.levels[-1] and max(level.sigma_hat for level in cut) == cut[0].sigma_hat
    assert len(cut) >= taken + 1
    options = {"sampler": "restart", "steps": 20, "strength": 0.3, "seed": 1, "progress": False}
    (image,) = image_to_image(shared("sd1"), an_image(), "cat", **options)
    assert np.isfinite(pixels(image)).all()
