"""Previews, and the tiny decoder against diffusers'."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderTiny
from PIL import Image
from safetensors.torch import save_file

from latentdiff import Pipeline
from latentdiff.cli.tiny_decoder import PreviewFile, TinyDecoder
from latentdiff.errors import CheckpointError, UsageError
from latentdiff.networks.config import VAEConfig
from tests import peers


@pytest.fixture(scope="module")
def peer() -> AutoencoderTiny:
    torch.manual_seed(0)
    return AutoencoderTiny().eval()


@pytest.fixture
def file(peer, tmp_path):
    """diffusers' weights in the published layout, where the clamp is a layer of its own and counts."""
    state = {}
    for name, tensor in peer.decoder.layers.state_dict().items():
        place, _, rest = name.partition(".")
        state[f"{int(place) + 1}.{rest}"] = tensor.contiguous()
    save_file(state, tmp_path / "taesd_decoder.safetensors")
    return tmp_path / "taesd_decoder.safetensors"


@torch.no_grad()
def test_same_picture_as_diffusers(peer, file):
    latents = 2.0 * torch.randn(2, 4, 6, 9, generator=torch.Generator().manual_seed(1))
    found = TinyDecoder.load(file)(latents)
    torch.testing.assert_close(found, peer.decode(latents).sample, rtol=1e-5, atol=1e-5)
    assert found.shape == (2, 3, 48, 72)


def test_names_are_those_of_the_published_file():
    names = set(TinyDecoder().state_dict())
    assert {"1.weight", "1.bias", "3.conv.0.weight", "7.weight", "18.conv.4.bias", "19.weight"} <= names
    assert "7.bias" not in names and len(names) == 67


def test_other_files_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="found no file"):
        TinyDecoder.load(tmp_path / "none.safetensors")
    save_file({"conv_in.weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="is no tiny decoder in the layout of taesd_decoder.safetensors"):
        TinyDecoder.load(tmp_path / "other.safetensors")


def test_a_decoder_for_another_model_is_refused():
    TinyDecoder(4).check_fit(VAEConfig())
    with pytest.raises(CheckpointError, match="for latents of 8 channels, 8 times smaller .* found one for 4 channels"):
        TinyDecoder(4).check_fit(VAEConfig(latent_channels=8))


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


def test_the_picture_is_the_same_with_previews(tmp_path):
    pipe = peers.ours("sd1")
    options = {"steps": 3, "seed": 1, "num_images": 2, "progress": False}
    plain = pipe("cat", **options)
    watched = pipe("cat", callback=PreviewFile(tmp_path / "preview.png", pipe.decode, every=1), **options)
    assert [image.tobytes() for image in plain] == [image.tobytes() for image in watched]
    assert Image.open(tmp_path / "preview.png").width > plain[0].width  # both on one sheet


@pytest.mark.parametrize("low_memory", [False, True])
def test_decoding_in_the_loop_leaves_the_networks_in_place(low_memory):
    pipe = Pipeline.load(peers.folder("sd1"), device="cpu", precision="fp32", low_memory=low_memory)
    pipe.residence.expect_no_more()
    options = {"steps": 2, "seed": 1, "progress": False}
    seen = []
    (watched,) = pipe("cat", callback=lambda step, t, x0: seen.append(pipe.decode(x0)), **options)
    assert len(seen) == 2
    assert watched.tobytes() == peers.ours("sd1")("cat", **options)[0].tobytes()
