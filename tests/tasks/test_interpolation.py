from __future__ import annotations

from functools import cache

import pytest
import torch

from latentdiff.diffusion.denoise import Cancelled
from latentdiff.errors import DataError, UsageError
from latentdiff.recipe import Recipe, read_recipe
from latentdiff.tasks import TASKS, interpolate
from latentdiff.tasks.interpolation import slerp
from tests import peers
from tests.tasks.images import apart

shared = cache(peers.ours)
QUICK = {"steps": 2, "seed": 3, "progress": False}


def test_the_ends_are_the_images_of_the_prompts():
    frames = interpolate(shared("sd1"), ["red fox", "cat", "blue dog"], frames=5, **QUICK)
    assert len(frames) == 5
    for frame, prompt, seed in [(0, "red fox", 3), (2, "cat", 4), (4, "blue dog", 5)]:
        (alone,) = shared("sd1")(prompt, **{**QUICK, "seed": seed})
        assert apart(frames[frame], alone) <= 1
    assert apart(frames[0], frames[1]) > 1 and apart(frames[1], frames[2]) > 1


def test_with_the_same_noise_only_the_text_changes():
    frames = interpolate(shared("sd1"), ["red fox", "red fox"], frames=2, same_noise=True, **QUICK)
    assert apart(*frames) <= 1
    assert apart(*interpolate(shared("sd1"), ["red fox", "red fox"], frames=2, **QUICK)) > 3


def test_slerp_keeps_lengths_and_turns_evenly():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 4, 8, 8, generator=generator)
    assert torch.equal(slerp(a, b, 0.0), a) and torch.allclose(slerp(a, b, 1.0), b)
    middle = slerp(a, b, 0.5)
    assert abs(middle.std() - 1) < 0.1 < abs(((a + b) / 2).std() - 1)
    between = [torch.cosine_similarity(x.flatten(), y.flatten(), dim=0) for x, y in ((a, middle), (middle, b))]
    assert abs(between[0] - between[1]) < 0.01
    assert torch.allclose(slerp(a, a, 0.3), a)
    turned = slerp(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]), 1 / 3)
    assert torch.allclose(turned, torch.tensor([3**0.5 / 2, 0.5]))


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_a_frame_does_not_depend_on_its_batch_and_is_made_again(sampler):
    options = {"frames": 5, "sampler": sampler, "width": 40, **QUICK}
    frames = interpolate(shared("sd1"), ["cat", "dog"], batch_size=3, **options)
    recipe = read_recipe(frames[3].info)
    assert recipe.task == "interpolate" and recipe.prompt == "cat -> dog" and frames[3].size == (40, 64)
    assert recipe.task_settings == {"prompts": ["cat", "dog"], "seeds": [3, 4], "frames": 5, "frame": 3, "fps": None}
    assert apart(TASKS["interpolate"](shared("sd1"), recipe, {}), frames[3]) <= 1


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        (["cat"], {}, "two prompts or more"),
        ("cat", {}, "two prompts or more"),
        (["cat", "dog"], {"frames": 1}, "frames to be a whole number of 2 or more"),
        (["cat", "dog"], {"num_images": 2}, "num_images 1"),
        (["cat", "dog"], {"seed": [1]}, "one seed or 2"),
        (["cat", "dog"], {"width": 13}, "multiple of 8"),
    ],
)
def test_bad_arguments(prompts, options, message):
    with pytest.raises(UsageError, match=message):
        interpolate(shared("sd1"), prompts, **{**QUICK, **options})


def test_the_callback_cancels():
    with pytest.raises(Cancelled):
        interpolate(shared("sd1"), ["cat", "dog"], callback=lambda *_: False, **QUICK)


WAY = {"prompts": ["cat", "dog"], "seeds": [3, 4], "frames": 5, "frame": 3, "fps": None}


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({**WAY, "frame": 5}, UsageError, "frame on the way"),
        ({**WAY, "frame": "3"}, DataError, "not valid at task_settings.frame"),
        ({**WAY, "seeds": [3]}, UsageError, "frame on the way"),
        ({**WAY, "code": 1}, DataError, r"does not know: \['code'\]"),
        ({"prompts": ["cat", "dog"]}, DataError, "not valid at task_settings.seeds: Field required"),
    ],
)
def test_hostile_recipes(settings, error, message):
    recipe = Recipe(
        prompt="", seed=0, steps=1, sampler="ddim", guidance_scale=1.0, width=64, height=64, task="interpolate",
        task_settings=settings,
    )  # fmt: skip
    with pytest.raises(error, match=message):
        TASKS["interpolate"](shared("sd1"), recipe, {})
