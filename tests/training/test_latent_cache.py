import numpy as np
import pytest
import torch
from accelerate import Accelerator

from latentdiff.errors import NotFiniteError
from latentdiff.networks.vae import VAE
from latentdiff.training import latent_cache as module
from latentdiff.training.captioned_folder import decoded_images, read_folder
from latentdiff.training.latent_cache import cached_latents
from latentdiff.training.networks import seeded
from latentdiff.training.vae_stage import to_signed
from tests.training.build import RESOLUTION, captioned_folder, config


@pytest.fixture
def inputs(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_SHARD", 4)
    vae = seeded(lambda: VAE(config(tmp_path).model.vae), 0)
    data = read_folder(captioned_folder(tmp_path / "train", 10))
    return vae, data, decoded_images(data, RESOLUTION, tmp_path / "cache"), tmp_path / "cache", Accelerator(cpu=True)


def shards(cache):
    return sorted(cache.glob("latents-*/*.safetensors"))


@torch.inference_mode()
def test_the_cache_holds_what_the_encoder_says(inputs):
    vae, data, images, *_ = inputs
    latents = cached_latents(*inputs)
    expected = vae.encode(to_signed(torch.tensor(np.asarray(images))))
    assert len(latents) == 10
    torch.testing.assert_close(torch.tensor(latents.mean).float(), expected.mean, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(torch.tensor(latents.logvar).float(), expected.logvar, rtol=1e-3, atol=1e-3)
    noise = np.random.default_rng(0).standard_normal((2, 4, 4, 4), dtype=np.float32)
    drawn = latents.sample(np.array([3, 7]), noise)
    wanted = expected.sample(torch.cat([torch.zeros(3, 4, 4, 4), torch.tensor(noise[:1]), torch.zeros(6, 4, 4, 4)]))[3]
    torch.testing.assert_close(torch.tensor(drawn[0]), wanted, rtol=1e-2, atol=5e-3)


def test_only_missing_shards_are_made(inputs, monkeypatch):
    first = cached_latents(*inputs)
    files = shards(inputs[3])
    assert len(files) == 3
    files[1].unlink()  # as after an interruption
    encoded = []
    encode = module._encode
    monkeypatch.setattr(module, "_encode", lambda vae, images: encoded.append(len(images)) or encode(vae, images))
    again = cached_latents(*inputs)
    assert encoded == [4]
    assert np.array_equal(again.mean, first.mean)


@pytest.mark.parametrize(("part", "folders"), [("encoder.conv_in", 2), ("quant_conv", 2), ("decoder.conv_in", 1)])
def test_a_new_encoder_gets_a_new_cache_a_new_decoder_does_not(inputs, part, folders):
    vae, *_, cache, _ = inputs
    cached_latents(*inputs)
    with torch.no_grad():
        vae.get_submodule(part).weight.mul_(1.5)
    cached_latents(*inputs)
    assert len(list(cache.glob("latents-*"))) == folders


def test_latents_that_are_not_finite_name_the_image(inputs):
    vae, _, images, cache, accelerator = inputs
    with torch.no_grad():
        vae.quant_conv.bias.fill_(1e6)  # beyond float16
    with pytest.raises(NotFiniteError, match=r"0\.png are not finite"):
        cached_latents(vae, inputs[1], images, cache, accelerator)
    assert shards(cache) == []
