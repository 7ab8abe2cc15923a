import numpy as np
import pytest
import torch
from accelerate import Accelerator

from latentdiff.checkpoints.components import load_components
from latentdiff.errors import NotFiniteError
from latentdiff.training import caches
from latentdiff.training.caches import cache_latents, cache_text
from latentdiff.training.store import RowStore, row_key
from tests.training.finetuning.build import model_folder


@pytest.fixture(scope="module")
def parts():
    return load_components(model_folder())


def pixels(seed, size=(16, 16)):
    return np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)


def work_of(keys, size=(16, 16), asked=None):
    def image(key):
        if asked is not None:
            asked.append(key)
        return pixels(ord(key), size)

    return {key: (size, lambda key=key: image(key), f"{key}.png") for key in keys}


def latents(parts, work, folder, precision="fp32"):
    return cache_latents(parts.vae, work, folder, precision, Accelerator(cpu=True), 1)


def test_rows_come_back(tmp_path):
    store = RowStore(tmp_path)
    store.write(["a", "b"], np.arange(12, dtype=np.float16).reshape(2, 2, 3))
    store.write(["c"], np.ones((1, 4), np.float32))
    again = RowStore(tmp_path)
    assert again["b"].tolist() == [[6, 7, 8], [9, 10, 11]] and again["c"].shape == (4,) and "d" not in again


@pytest.mark.parametrize(
    "damage", [lambda path: path.write_bytes(b""), lambda path: path.write_bytes(path.read_bytes()[:-1])]
)
def test_a_damaged_shard_counts_as_missing(tmp_path, damage):
    RowStore(tmp_path).write(["a"], np.zeros((1, 50), np.float32))
    damage(tmp_path / "a.safetensors")
    assert "a" not in RowStore(tmp_path)


def test_keys_depend_on_every_part():
    assert len({row_key(*parts) for parts in [("a", 1), ("a", 2), ("b", 1), ("a", 1, None)]}) == 4


def test_latents_are_distributions_of_the_encoder(parts, tmp_path):
    cache = latents(parts, work_of("ab"), tmp_path)
    noise = np.random.default_rng(0).standard_normal((2, 4, 4, 4)).astype(np.float32)
    images = torch.from_numpy(np.stack([pixels(ord(key)) for key in "ab"])).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        expected = parts.vae.encode(images).sample(torch.from_numpy(noise))
    torch.testing.assert_close(torch.from_numpy(cache.sample(["a", "b"], noise)), expected, rtol=1e-4, atol=1e-5)
    assert np.abs(cache.sample(["a"], noise[:1]) - cache.sample(["a"], noise[1:])).max() > 1e-3


def test_only_what_is_new_is_encoded(parts, tmp_path):
    latents(parts, work_of("abc"), tmp_path)
    asked = []
    latents(parts, work_of("abcd", asked=asked), tmp_path)
    assert asked == ["d"]
    latents(parts, work_of("a", asked=asked), tmp_path, precision="fp16")
    assert asked == ["d", "a"]


def test_an_interrupted_build_goes_on(parts, tmp_path, monkeypatch):
    monkeypatch.setattr(caches, "_SHARD", 2)
    monkeypatch.setattr(caches, "_IMAGES_AT_ONCE", 1)
    work = work_of("abcde")
    work["d"] = ((16, 16), lambda: 1 / 0, "d.png")
    with pytest.raises(ZeroDivisionError):
        latents(parts, work, tmp_path)
    asked = []
    latents(parts, work_of("abcde", asked=asked), tmp_path)
    assert asked == ["c", "d", "e"]
    assert not list(tmp_path.rglob(".*"))


def test_images_of_different_sizes(parts, tmp_path):
    cache = latents(parts, work_of("ab") | work_of("cd", (24, 8)), tmp_path)
    assert cache.sample(["d"], np.zeros((1, 4, 2, 6), np.float32)).shape == (1, 4, 2, 6)


def test_another_encoder_gets_another_folder(parts, tmp_path):
    latents(parts, work_of("a"), tmp_path)
    other = load_components(model_folder()).vae
    with torch.no_grad():
        other.encoder.conv_in.bias += 1
    asked = []
    cache_latents(other, work_of("a", asked=asked), tmp_path, "fp32", Accelerator(cpu=True), 1)
    assert asked == ["a"] and len(list(tmp_path.iterdir())) == 2


def test_another_decoder_does_not(parts, tmp_path):
    latents(parts, work_of("a"), tmp_path)
    other = load_components(model_folder()).vae
    with torch.no_grad():
        other.decoder.conv_in.bias += 1
    asked = []
    cache_latents(other, work_of("a", asked=asked), tmp_path, "fp32", Accelerator(cpu=True), 1)
    assert not asked and len(list(tmp_path.iterdir())) == 1


def test_latents_that_are_not_finite_name_the_image(parts, tmp_path):
    broken = load_components(model_folder()).vae
    with torch.no_grad():
        broken.quant_conv.bias += 1e6
    with pytest.raises(
        NotFiniteError, match=r"the latents of a\.png are not finite in fp16; try cache_precision: fp32"
    ):
        cache_latents(broken, work_of("a"), tmp_path, "fp16", Accelerator(cpu=True), 1)


def test_text_is_that_of_the_encoder(parts, tmp_path):
    tokens = parts.tokenizer(["a cat", "", "a cat"], padding="max_length", max_length=16)["input_ids"]
    rows = np.array(tokens, np.int32)[:, None]
    cache = cache_text(parts.text_encoder, list(rows), tmp_path, "fp32", Accelerator(cpu=True))
    with torch.no_grad():
        expected = parts.text_encoder(torch.tensor(tokens))
    torch.testing.assert_close(torch.from_numpy(cache.embeddings(rows)), expected, rtol=1e-4, atol=1e-5)
    (shard,) = tmp_path.rglob("*.safetensors")
    assert len(RowStore(shard.parent)._rows) == 2
