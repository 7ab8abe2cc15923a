"""The examples for engines are what the U-Net sees when images are made."""

from __future__ import annotations

import pytest
import torch

from latentdiff.engines.calibration import PROMPTS, STEPS, calibration_examples
from tests import peers


@pytest.mark.parametrize("family", ["sd1", "inpaint"])
def test_examples_are_the_calls_of_a_guided_walk(family: str) -> None:
    pipe = peers.ours(family)
    config = pipe.unet.config
    examples = calibration_examples(pipe.tokenizer, pipe.text_encoder, pipe.unet, pipe.schedule, 4)
    assert len(examples) == STEPS * len(PROMPTS)
    times = [t for _, t, _ in examples]
    assert max(times) == 999 and times[:STEPS] == times[STEPS : 2 * STEPS] == sorted(times[:STEPS], reverse=True)
    for x, _, context in examples:
        assert x.shape == (2, config.in_channels, config.sample_size, config.sample_size)
        assert all(keys.shape[0] == 2 for keys, _ in context.values())
    first = [x for x, t, _ in examples if t == 999]
    assert not any(torch.equal(first[0], other) for other in first[1:])  # each from noise of its own
    again = calibration_examples(pipe.tokenizer, pipe.text_encoder, pipe.unet, pipe.schedule, 4)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(examples, again, strict=True))
