"""What a program has set in torch for itself changes no picture."""

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


def test_a_default_of_float64_changes_nothing(expected):
    torch.set_default_dtype(torch.float64)
    try:
        assert np.array_equal(drawn(), expected)
    finally:
        torch.set_default_dtype(torch.float32)


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
