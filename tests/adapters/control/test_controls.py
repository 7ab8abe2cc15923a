"""Controls in a pipeline: samplers, batches, adapters, memory, and what is refused."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from latentdiff import ControlNet, Pipeline, image_to_image, inpaint, interpolate
from latentdiff.adapters.control.hints import hint_tensor
from latentdiff.errors import CheckpointError, DataError, UsageError
from latentdiff.model.memory.estimate import denoising_bytes, needed, weight_bytes
from latentdiff.model.memory.streaming import StreamedPart
from latentdiff.networks.rows import window_of
from latentdiff.recipe import read_recipe
from latentdiff.request.options import SamplerName
from tests import peers
from tests.adapters.control.nets import hint, saved
from tests.adapters.lora.conftest import make
from tests.tasks.images import an_image, apart, mask

QUICK = {"steps": 3, "seed": 1, "progress": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return saved(tmp_path_factory.mktemp("control"))


@pytest.fixture(scope="module")
def net(folder) -> ControlNet:
    return ControlNet.load(folder)


shared = cache(peers.ours)


@given(st.integers(1, 30), st.floats(0, 1), st.floats(0, 1))
def test_the_window_holds_the_steps_that_diffusers_keeps(count, start, end):
    timesteps = np.linspace(981, 1, count).tolist()
    low, high = window_of([*timesteps, *timesteps[:2]], start, end)
    kept = [not (i / count < start or (i + 1) / count > end) for i in range(count)]
    assert [low < t <= high for t in timesteps] == kept
    between = [(a + b) / 2 for a, b in zip(timesteps, timesteps[1:], strict=False)]
    assert [low < t <= high for t in between] == kept[
        :-1
    ]  # a solver's own evaluations belong to the step that they are in


@pytest.mark.parametrize("sampler", ["euler", "dpmpp-sde", "heun", "restart", "lcm", "unipc"])
def test_any_sampler_takes_them(net, sampler):
    assert sampler in SamplerName.__args__
    options = {**QUICK, "steps": 6, "sampler": sampler}
    plain, nothing, full = (
        shared("sd1")("cat", controls=controls, **options)[0]
        for controls in (None, [net(hint(), scale=0.0)], [net(hint())])
    )
    assert apart(plain, nothing) == 0 and apart(plain, full) > 2


def test_an_image_does_not_depend_on_its_batch(net):
    controls = [net(hint(), guess=True), net(hint(2), scale=0.5)]
    prompts = ["cat", "a red fox AND a dog", "cat " * 90]
    together = shared("sd1")(prompts, controls=controls, batch_size=3, **{**QUICK, "seed": [1, 1, 1]})
    alone = [shared("sd1")(prompt, controls=controls, **QUICK)[0] for prompt in prompts]
    assert [apart(a, b) for a, b in zip(together, alone, strict=True)] <= [1, 1, 1]


def test_with_a_lora(net):
    pipe = peers.ours("sd1")
    lora = make(pipe)
    without = pipe("cat", controls=[net(hint())], **QUICK)[0]
    with lora.attached():
        adapted = pipe("cat", controls=[net(hint())], **QUICK)[0]
        assert apart(adapted, pipe("cat", **QUICK)[0]) > 2
    assert apart(adapted, without) > 2 and apart(pipe("cat", controls=[net(hint())], **QUICK)[0], without) == 0


def test_low_memory_makes_the_same_image(net, folder):
    pipe = Pipeline.load(peers.folder("sd1"), device="cpu", precision="fp32", low_memory=True)
    control = ControlNet.load(folder)
    low = pipe("cat", controls=[control(hint())], **QUICK)[0]
    assert apart(low, shared("sd1")("cat", controls=[net(hint())], **QUICK)[0]) == 0
    (part,) = pipe.residence.beside.values()
    assert isinstance(part, StreamedPart) and not part.is_ready  # given back for the decoder
    del control, part
    assert not list(pipe.residence.beside.values())  # gone with the ControlNet


def test_memory_is_counted(net):
    residence = shared("sd1").residence
    shared("sd1")("cat", controls=[net(hint())], **QUICK)
    part = residence.beside[net]
    plain, controlled = (residence.workload(2, 64, 64, beside=beside) for beside in ([], [part]))
    size = weight_bytes(part.module)
    assert controlled.beside == size > 0
    assert needed(controlled, at_once=True) - needed(plain, at_once=True) >= size
    assert denoising_bytes(controlled) > denoising_bytes(plain)


def test_a_hint_of_another_size_is_resized():
    large = hint(size=(128, 128))
    expected = np.asarray(large.resize((64, 64), Image.Resampling.LANCZOS)) / 255
    np.testing.assert_allclose(hint_tensor(large, None, 64, 64, 8)[0].permute(1, 2, 0), expected, atol=1e-6)
    same = hint_tensor(hint(), None, 64, 64, 8)
    np.testing.assert_allclose(same[0].permute(1, 2, 0), np.asarray(hint()) / 255, atol=1e-6)
    # The image of a task is extended to whole latents: so is its hint, and no pixel moves.
    cut = hint().crop((0, 0, 61, 58))
    extended = hint_tensor(cut, None, 64, 64, 8)
    assert torch.equal(extended[0, :, :58, :61], same[0, :, :58, :61])
    assert torch.equal(extended[0, :, 60, 63], same[0, :, 57, 60])


def test_the_mask_of_an_inpainting_control():
    found = hint_tensor(hint(), mask((8, 8, 24, 16)), 64, 64, 8)
    assert (found[0, :, 8:16, 8:24] == -1).all() and (found >= 0).sum() == 3 * (64 * 64 - 16 * 8)
    with pytest.raises(UsageError, match="mask of a control at its image's size"):
        hint_tensor(hint(), mask((0, 0, 8, 8), 32, 32), 64, 64, 8)


def test_painting_only_the_masked_part_cuts_the_hint(net):
    """The cutout with the hint cut by hand."""
    options = {**QUICK, "strength": 1.0}
    box, area = (16, 16, 48, 48), mask((20, 20, 44, 44))
    found = inpaint(
        shared("sd1"), an_image(), area, "cat", only_masked=True, padding=4, controls=[net(hint())], **options
    )[0]
    cut = hint().resize((64, 64), Image.Resampling.LANCZOS, box=box)
    cutout = an_image().crop(box).resize((64, 64), Image.Resampling.LANCZOS)
    part = inpaint(
        shared("sd1"),
        cutout,
        area.crop(box).resize((64, 64), Image.Resampling.BILINEAR),
        "cat",
        controls=[net(cut)],
        **options,
    )[0].resize((32, 32), Image.Resampling.LANCZOS)
    inner = (6, 6, 26, 26)
    other = inpaint(shared("sd1"), an_image(), area, "cat", only_masked=True, padding=4, **options)[0]
    assert apart(found.crop(box).crop(inner), part.crop(inner)) <= 3 < apart(found, other)


def test_recipes_hold_them(net, folder, tmp_path):
    hint().save(tmp_path / "hint.png")
    control = net(tmp_path / "hint.png", scale=0.8, end=0.6)
    for image in (
        shared("sd1")("cat", controls=[control], **QUICK)[0],
        image_to_image(shared("sd1"), an_image(), "cat", controls=[control], **QUICK)[0],
        interpolate(shared("sd1"), ["cat", "dog"], frames=2, controls=[control], **QUICK)[0],
    ):
        (recorded,) = read_recipe(image.info).controls
        assert (recorded.scale, recorded.start, recorded.end, recorded.guess) == (0.8, 0.0, 0.6, False)
        assert recorded.image["file"] == "hint.png" and len(recorded.model["sha256"]) == 64
        assert read_recipe(image.info).roles()["control_model1"] == recorded.model


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cache_interval": 2}, "leave cache_interval at 1, found 2"),
        ({"width": 128}, "in the proportions of what is made, 128 x 64 pixels, found 64 x 64"),
        ({"controls": [hint()]}, "what a ControlNet makes of images"),
    ],
)
def test_refusals(net, options, message):
    with pytest.raises(UsageError, match=message) as error:
        shared("sd1")("cat", **{"controls": [net(hint())], **QUICK, **options})
    assert "\n" not in str(error.value)


def test_a_back_end_that_leaves_the_modules_is_refused(net):
    pipe = peers.ours("sd1")
    pipe.backend = "openvino"
    with pytest.raises(UsageError, match="ControlNets need the back end torch"):
        pipe("cat", controls=[net(hint())], **QUICK)


def test_a_control_of_another_family_is_refused(net):
    with pytest.raises(
        CheckpointError, match="a ControlNet for another model: text width 32, expected 192"
    ) as error:
        Pipeline.load(device="cpu")("cat", controls=[net(hint())], **QUICK)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": -1.0}, "scale to be a finite number of 0 or more"),
        ({"start": 0.6, "end": 0.5}, "start of a control before its end"),
        ({"end": 1.5}, "end to be a finite number of 0 to 1"),
        ({"prepare": "magic"}, "prepare to be one of canny"),
        ({"strength": 0.5}, "no option 'strength'"),
    ],
)
def test_bad_arguments(net, options, message):
    with pytest.raises(UsageError, match=message):
        net(hint(), **options)


def test_a_missing_image(net):
    with pytest.raises(DataError, match="no image"):
        net("none.png")
