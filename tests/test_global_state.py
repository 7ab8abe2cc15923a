"""What a program has set in torch for itself changes no image."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from latentdiff import Pipeline


def drawn(pipe: Pipeline | None = None) -> np.ndarray:
    pipe = pipe or Pipeline.load(device="cpu", precision="fp32")
    return np.asarray(pipe("a cat on a blue background", seed=1, steps=2, progress=False)[0])


@pytest.fixture(scope="module")
def expected() -> np.ndarray:
    return drawn()


PROMPTS = ("a cat on a (blue:1.3) background", "a cat [on a:0.5] blue background")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sampler", ["ddim", "dpmpp-sde"])
def test_another_default_dtype_changes_nothing(dtype, sampler):
    pipe = Pipeline.load(device="cpu", precision="fp32")
    asked = {"seed": 1, "steps": 2, "sampler": sampler, "cache_interval": 2, "progress": False}
    expected = [np.asarray(image) for image in pipe(PROMPTS, **asked)]
    torch.set_default_dtype(dtype)
    try:
        for each in (pipe, Pipeline.load(device="cpu", precision="fp32")):
            assert all(np.array_equal(*both) for both in zip(each(PROMPTS, **asked), expected, strict=True))
    finally:
        torch.set_default_dtype(torch.float32)


SETTINGS = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "a default device": lambda: torch.device("meta"),
    "no gradients": lambda: torch.set_grad_enabled(False),
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_what_is_in_force_around_a_call_changes_nothing(expected, setting):
    pipe = Pipeline.load(device="cpu", precision="fp32")
    with SETTINGS[setting]():
        assert np.array_equal(drawn(pipe), expected)
        assert np.array_equal(drawn(), expected)


def test_deterministic_algorithms_change_nothing(expected):
    torch.use_deterministic_algorithms(True)
    try:
        assert np.array_equal(drawn(), expected)
    finally:
        torch.use_deterministic_algorithms(False)


def test_what_is_loaded_in_inference_mode_serves_outside(expected):
    with torch.inference_mode():
        pipe = Pipeline.load(device="cpu", precision="fp32")
        assert np.array_equal(drawn(pipe), expected)
    assert np.array_equal(drawn(pipe), expected)
    assert not any(weight.is_inference() for weight in pipe.unet.parameters())
    assert np.array_equal(drawn(pipe.to("cpu", "bf16").to("cpu", "fp32")), drawn(pipe))
