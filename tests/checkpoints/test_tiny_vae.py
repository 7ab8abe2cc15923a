"""The tiny autoencoder against diffusers', in all forms of its files."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import AutoencoderTiny
from safetensors.torch import load_file, save_file

from latentdiff.checkpoints.parts import read_part
from latentdiff.checkpoints.tiny_vae import check_decoder_fits, load_tiny_decoder
from latentdiff.errors import CheckpointError
from latentdiff.networks.config import VAEConfig
from latentdiff.networks.tiny_vae import TinyDecoder, TinyVAE, TinyVAEConfig


@pytest.fixture(scope="module")
def peer() -> AutoencoderTiny:
    torch.manual_seed(0)
    return AutoencoderTiny().eval()


@pytest.fixture
def folder(peer, tmp_path):
    """diffusers' weights in the published layout, where the clamp is a layer of its own and counts."""
    for half, shift in (("encoder", 0), ("decoder", 1)):
        state = {}
        for name, tensor in getattr(peer, half).layers.state_dict().items():
            place, _, rest = name.partition(".")
            state[f"{int(place) + shift}.{rest}"] = tensor.contiguous()
        save_file(state, tmp_path / f"taesd_{half}.safetensors")
    return tmp_path


def built(part) -> TinyVAE:
    vae = TinyVAE(TinyVAEConfig.from_diffusers(part.config))
    vae.load_state_dict(part.tensors)
    return vae.eval()


@torch.no_grad()
def agree(vae: TinyVAE, peer: AutoencoderTiny) -> None:
    generator = torch.Generator().manual_seed(1)
    latents = 2.0 * torch.randn(2, 4, 6, 9, generator=generator)
    image = torch.rand(1, 3, 32, 24, generator=generator) * 2 - 1
    torch.testing.assert_close(vae.decode(latents), peer.decode(latents).sample, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(vae.encode(image).mode(), peer.encode(image).latents, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["taesd_decoder.safetensors", "taesd_encoder.safetensors"])
def test_published_files(peer, folder, name):
    part = read_part(folder / name, "vae", None)
    assert len(part.files) == 2
    agree(built(part), peer)


def test_folder_of_diffusers(peer, tmp_path):
    peer.save_pretrained(tmp_path / "taesd")
    agree(built(read_part(tmp_path / "taesd", "vae", None)), peer)


def test_both_halves_in_one_file(peer, folder):
    both = {
        f"taesd_{half}.{name}": tensor
        for half in ("encoder", "decoder")
        for name, tensor in load_file(folder / f"taesd_{half}.safetensors").items()
    }
    save_file(both, folder / "taesd.safetensors")
    agree(built(read_part(folder / "taesd.safetensors", "vae", None)), peer)


def test_half_of_one(folder):
    (folder / "taesd_encoder.safetensors").unlink()
    with pytest.raises(CheckpointError, match="only the decoder of a tiny autoencoder.*put taesd_encoder"):
        read_part(folder / "taesd_decoder.safetensors", "vae", None)


@torch.no_grad()
def test_the_decoder_alone(peer, folder):
    latents = torch.randn(1, 4, 6, 9, generator=torch.Generator().manual_seed(1))
    decoder = load_tiny_decoder(folder / "taesd_decoder.safetensors")
    torch.testing.assert_close(decoder(latents), peer.decode(latents).sample, rtol=1e-5, atol=1e-5)


def test_other_files_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="found no file"):
        load_tiny_decoder(tmp_path / "none.safetensors")
    save_file({"conv_in.weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="is no tiny decoder in the layout of taesd_decoder.safetensors"):
        load_tiny_decoder(tmp_path / "other.safetensors")


def test_a_decoder_for_another_model_is_refused():
    check_decoder_fits(TinyDecoder(4), VAEConfig())
    with pytest.raises(CheckpointError, match="for latents of 8 channels, 8 times smaller .* found one for 4 channels"):
        check_decoder_fits(TinyDecoder(4), VAEConfig(latent_channels=8))


def test_configuration_opens_in_diffusers():
    config = TinyVAEConfig().to_diffusers()
    assert json.loads(json.dumps(config)) == config
    theirs = AutoencoderTiny.from_config(config)
    assert set(theirs.state_dict()) == set(TinyVAE(TinyVAEConfig()).state_dict())
