import numpy as np
import pytest
import torch

from latentdiff.checkpoints.components import Components
from latentdiff.errors import ConfigError
from latentdiff.networks.attention import use_attention_backend
from latentdiff.networks.vae import VAE
from latentdiff.training.data.tokens import CaptionTokens
from latentdiff.training.material import material
from latentdiff.training.samples import Batches, Samples
from latentdiff.training.stages.diffusion import diffusion_task
from latentdiff.training.stages.networks import load_tokenizer, new_text_encoder, new_unet
from tests import tiny
from tests.training.build import RESOLUTION, config, dataset

COUNT = 40


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return tiny.tokenizer(tmp_path_factory.mktemp("tokenizer"), max_length=16)


class Latents:
    """Latents of images by their keys, of little variance."""

    def __init__(self, samples, mean):
        self.places = {samples.latent_key(index): index for index in range(len(mean))}
        self.mean = mean

    def sample(self, keys, noise):
        return self.mean[[self.places[key] for key in keys]] + np.exp(-2, dtype=np.float32) * noise


def latents(count):
    return np.random.default_rng(count).standard_normal((count, 4, 4, 4)).astype(np.float32)


def samples_of(captions, mean, tokenizer, settings):
    tokens = CaptionTokens(tokenizer, "cut")
    samples = Samples(dataset(captions), [(RESOLUTION, RESOLUTION)] * len(captions), tokens, settings, (4, 4))
    samples.latents = Latents(samples, mean)
    return samples


def task(tmp_path, tokenizer, held_out=None, **changes):
    run = config(tmp_path, diffusion={"max_steps": 10, "batch_size": 8, "lr": 1e-3, **changes})
    model, settings = run.model, run.diffusion
    training = samples_of(["cat " * (1 + i % 3) for i in range(COUNT)], latents(COUNT), tokenizer, settings)
    other = samples_of(["cat"] * 5, latents(5) if held_out is None else held_out, tokenizer, settings)
    parts = Components(
        tokenizer, new_text_encoder(model.text_encoder, tokenizer, 0), new_unet(model.unet, 0), VAE(model.vae), model.schedule
    )  # fmt: skip
    return diffusion_task(run, parts, material(training, np.arange(COUNT), (other, np.arange(5)), 0), tmp_path)


def tensors(batch):
    return {name: torch.tensor(array) for name, array in batch.items()}


def test_captions_stay_with_their_images(tmp_path, tokenizer):
    made = task(tmp_path, tokenizer, caption_dropout=0.0)
    for step in range(10):
        indices = [int(name.removesuffix(".png")) for name in made.sources(step)]
        batch = made.batch(step, range(8))
        captions = [" ".join(["cat"] * (1 + i % 3)) for i in indices]
        assert np.array_equal(batch["tokens"], CaptionTokens(tokenizer, "cut").rows(captions, 1))
        closeness = np.abs(batch["latents"] - latents(COUNT)[indices]).max()
        assert 0 < closeness < 5 * np.exp(-2)


def test_other_captions_are_other_data(tmp_path, tokenizer):
    first, again = task(tmp_path, tokenizer), task(tmp_path, tokenizer)
    assert first.fingerprint == again.fingerprint
    samples = again._material.samples
    samples.data.__dict__["captions"] = (("a dog",), *samples.data.captions[1:])
    changed = Batches(samples, np.arange(COUNT), again._batches._settings, 0, 1000)
    assert changed.fingerprint not in first.fingerprint


def test_share_of_dropped_captions(tmp_path, tokenizer):
    made = task(tmp_path, tokenizer, caption_dropout=0.25)
    empty = CaptionTokens(tokenizer, "cut").rows([""], 1)[0]
    tokens = np.concatenate([made.batch(step, range(8))["tokens"] for step in range(300)])
    assert (tokens == empty).all((1, 2)).mean() == pytest.approx(0.25, abs=0.03)


def test_batches_are_new_every_epoch_and_split_evenly(tmp_path, tokenizer):
    made = task(tmp_path, tokenizer)
    whole = made.batch(3, range(8))
    for name, array in made.batch(3, range(4, 8)).items():
        assert np.array_equal(array, whole[name][4:])
    assert not np.array_equal(made.batch(3, range(8))["noise"], made.batch(8, range(8))["noise"])


def test_loss_starts_at_the_variance_of_the_target(tmp_path, tokenizer):
    """The network starts by saying zero, so the error is the mean square of the target: of v, about one."""
    made = task(tmp_path, tokenizer, min_snr_gamma=None)
    parts = made.module(tensors(made.batch(0, range(8))), 0)
    assert parts["loss"].item() == parts["mse"].item() == pytest.approx(1.0, abs=0.25)


def test_loss_is_weighted_by_min_snr(tmp_path, tokenizer):
    made = task(tmp_path, tokenizer, min_snr_gamma=5.0)
    batch = tensors(made.batch(0, range(8)))
    errors = made.module.errors(batch)
    alpha_squared = made.module.objective.alpha[batch["timesteps"]] ** 2
    snr = alpha_squared / (1 - alpha_squared)
    expected = (snr.clamp(max=5) / (snr + 1) * errors).mean()
    assert made.module(batch, 0)["loss"].item() == pytest.approx(expected.item(), rel=1e-3)


def test_attention_back_ends_train_alike(tmp_path, tokenizer):
    gradients = []
    for attention in ("sdpa", "plain"):
        made = task(tmp_path, tokenizer)
        torch.nn.init.ones_(
            made.module.unet.conv_out.weight
        )  # it starts at zero, and then nothing else gets a gradient
        with use_attention_backend(attention):
            made.module(tensors(made.batch(0, range(8))), 0)["loss"].backward()
        gradients.append({name: p.grad for name, p in made.module.named_parameters() if p.grad is not None})
    largest = max(gradient.abs().max() for gradient in gradients[0].values())
    assert any(name.startswith("text_encoder") for name in gradients[0])
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-3, atol=1e-5 * largest)


def test_text_encoder_has_its_own_learning_rate(tmp_path, tokenizer):
    groups = task(tmp_path, tokenizer, text_encoder_lr=1e-4).parameter_groups()
    assert [(group.name, pytest.approx(group.lr_scale)) for group in groups] == [("unet", 1.0), ("text_encoder", 0.1)]
    whole = task(tmp_path, tokenizer).parameter_groups()[0].parameters
    assert groups[0].parameters.keys() | groups[1].parameters.keys() == whole.keys()


@torch.inference_mode()
def test_validation_is_the_same_every_time_and_by_bands(tmp_path, tokenizer):
    made = task(tmp_path, tokenizer)
    first = made.validate()
    assert first == made.validate()
    names = ["val_0_199", "val_200_399", "val_400_599", "val_600_799", "val_800_999"]
    assert list(first)[:6] == ["val_mse", *names] and first["gap"] == pytest.approx(
        first["val_mse"] - first["train_mse"], abs=1e-4
    )
    bands = [first[name] for name in names]
    assert first["val_mse"] == pytest.approx(sum(bands) / 5, rel=1e-3)


@torch.inference_mode()
def test_validation_bands_are_told_apart(tmp_path, tokenizer):
    """A network that says zero for v errs by v², whose mean is alpha² + sigma² E[x0²]: given by the latents."""
    made = task(tmp_path, tokenizer, held_out=np.zeros((5, 4, 4, 4), np.float32))
    losses = made.validate()
    objective = made.module.objective
    for band in range(5):
        span = objective.alpha[200 * band : 200 * (band + 1)] ** 2  # E[eps²] alpha², and x0 is 0
        value = losses[f"val_{200 * band}_{200 * band + 199}"]
        assert 0.75 * span.min().item() < value < 1.25 * span.max().item()


def test_tokenizer_folder_problems(tmp_path):
    with pytest.raises(ConfigError, match="expected a CLIP tokenizer in") as error:
        load_tokenizer(tmp_path / "none", 16)
    assert "\n" not in str(error.value)
    tiny.save_tokenizer(tmp_path / "long", max_length=77)
    with pytest.raises(ConfigError, match="has model_max_length 77, more than text_encoder.max_position_embeddings 16"):
        load_tokenizer(tmp_path / "long", 16)
