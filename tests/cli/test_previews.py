"""Previews."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from latentdiff import Pipeline
from latentdiff.cli.previews import PreviewFile
from latentdiff.errors import UsageError
from tests import peers


@pytest.mark.parametrize(("every", "expected"), [(1, [0, 1, 2, 3, 4, 5]), (2, [0, 2, 4]), (5, [0, 5])])
def test_previews_are_written_every_so_many_steps(tmp_path, every, expected):
    path, seen = tmp_path / "preview.png", []

    def decode(latents):
        seen.append(int(latents[0, 0, 0, 0]))
        return torch.zeros(len(latents), 3, 16, 16)

    callback = PreviewFile(path, decode, every=every)
    for step in range(6):
        assert callback(step, 900.0, torch.full((1, 4, 2, 2), float(step))) is None
    assert seen == expected
    assert Image.open(path).size == (16, 16)
    with pytest.raises(UsageError, match="a preview every 1 step or more, found 0"):
        PreviewFile(path, decode, every=0)


def test_the_image_is_the_same_with_previews(tmp_path):
    pipe = peers.ours("sd1")
    options = {"steps": 3, "seed": 1, "num_images": 2, "progress": False}
    plain = pipe("cat", **options)
    watched = pipe("cat", callback=PreviewFile(tmp_path / "preview.png", pipe.decode, every=1), **options)
    assert [image.tobytes() for image in plain] == [image.tobytes() for image in watched]
    assert Image.open(tmp_path / "preview.png").width > plain[0].width  # both on one sheet


@pytest.mark.parametrize("low_memory", [False, True])
def test_decoding_in_the_loop_leaves_the_networks_in_place(low_memory):
    pipe = Pipeline.load(peers.folder("sd1"), device="cpu", precision="fp32", low_memory=low_memory)
    pipe.residence.keep = False
    options = {"steps": 2, "seed": 1, "progress": False}
    seen = []
    (watched,) = pipe("cat", callback=lambda step, t, x0: seen.append(pipe.decode(x0)), **options)
    assert len(seen) == 2
    assert watched.tobytes() == peers.ours("sd1")("cat", **options)[0].tobytes()
