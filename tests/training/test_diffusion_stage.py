import numpy as np
import pytest
import torch

from latentdiff.diffusion.schedule import Schedule
from latentdiff.errors import ConfigError
from latentdiff.training.captioned_folder import CaptionedFolder
from latentdiff.training.config import DiffusionStageSection
from latentdiff.training.diffusion_stage import DiffusionTask, load_tokenizer, tokenize
from latentdiff.training.latent_cache import CachedLatents
from latentdiff.training.networks import new_text_encoder, new_unet
from tests import tiny
from tests.training.build import config

COUNT = 40


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return tiny.tokenizer(tmp_path_factory.mktemp("tokenizer"), max_length=16)


def latents(count):
    random = np.random.default_rng(count)
    mean = random.standard_normal((count, 4, 4, 4)).astype(np.float16)
    return CachedLatents(mean, np.full_like(mean, -4))


def task(tmp_path, tokenizer, sheet=None, **changes):
    model = config(tmp_path).model
    data = CaptionedFolder(
        None, tuple(f"{i}.png" for i in range(COUNT)), tuple("cat " * (1 + i % 3) for i in range(COUNT))
    )
    data.__dict__["fingerprint"] = "0"
    settings = DiffusionStageSection(**{"max_steps": 10, "batch_size": 8, "lr": 1e-3, **changes})
    tokens, _ = tokenize(tokenizer, data.captions)
    empty, _ = tokenize(tokenizer, [""])
    return DiffusionTask(
        new_unet(model.unet, 0), new_text_encoder(model.text_encoder, tokenizer, 0), Schedule(model.schedule), settings,
        data, tokens, latents(COUNT), tokens[:5], latents(5), empty=empty[0], sheet=sheet, seed=0,
    )  # fmt: skip


def tensors(batch):
    return {name: torch.tensor(array) for name, array in batch.items()}


def test_captions_stay_with_their_images(tmp_path, tokenizer):
    made = task(tmp_path, tokenizer, caption_dropout=0.0)
    for step in range(10):
        indices = [int(name.removesuffix(".png")) for name in made.sources(step)]
        batch = made.batch(step, range(8))
        assert np.array_equal(batch["tokens"], tokenize(tokenizer, ["cat " * (1 + i % 3) for i in indices])[0])
        closeness = np.abs(batch["latents"] - latents(COUNT).mean[indices].astype(np.float32)).max()
        assert 0 < closeness < 5 * np.exp(-2)


def test_share_of_dropped_captions(tmp_path, tokenizer):
    made = task(tmp_path, tokenizer, caption_dropout=0.25)
    empty = tokenize(tokenizer, [""])[0][0]
    tokens = np.concatenate([made.batch(step, range(8))["tokens"] for step in range(300)])
    assert (tokens == empty).all(1).mean() == pytest.approx(0.25, abs=0.03)


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
    context = made.module.text_encoder(batch["tokens"])
    errors = made.module.errors(batch["latents"], batch["noise"], batch["timesteps"], context)
    alpha_squared = made.module.objective.alpha[batch["timesteps"]] ** 2
    snr = alpha_squared / (1 - alpha_squared)
    expected = (snr.clamp(max=5) / (snr + 1) * errors).mean()
    assert made.module(batch, 0)["loss"].item() == pytest.approx(expected.item(), rel=1e-3)


def test_attention_back_ends_train_alike(tmp_path, tokenizer):
    gradients = []
    for attention in ("sdpa", "plain"):
        made = task(tmp_path, tokenizer, attention=attention)
        torch.nn.init.ones_(
            made.module.unet.conv_out.weight
        )  # it starts at zero, and then nothing else gets a gradient
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
    bands = [value for name, value in first.items() if name != "val_mse"]
    assert list(first) == ["val_mse", "val_0_199", "val_200_399", "val_400_599", "val_600_799", "val_800_999"]
    assert first["val_mse"] == pytest.approx(sum(bands) / 5, rel=1e-3)


@torch.inference_mode()
def test_validation_bands_are_told_apart(tmp_path, tokenizer):
    """A network that says zero for v errs by v², whose mean is alpha² + sigma² E[x0²]: given by the latents."""
    made = task(tmp_path, tokenizer)
    made._held_out = CachedLatents(np.zeros((5, 4, 4, 4), np.float16), np.full((5, 4, 4, 4), -30, np.float16))
    losses = made.validate()
    objective = made.module.objective
    for band in range(5):
        span = objective.alpha[200 * band : 200 * (band + 1)] ** 2  # E[eps²] alpha², and x0 is 0
        value = losses[f"val_{200 * band}_{200 * band + 199}"]
        assert 0.75 * span.min().item() < value < 1.25 * span.max().item()


def test_preview_calls_the_sheet(tmp_path, tokenizer):
    paths = []
    task(tmp_path, tokenizer, sheet=paths.append).preview(tmp_path, 12)
    assert paths == [tmp_path / "step-00000012.png"]
    task(tmp_path, tokenizer).preview(tmp_path, 12)


def test_tokens_and_the_number_of_cut_captions(tokenizer):
    tokens, cut = tokenize(tokenizer, ["cat", "cat " * 14, "cat " * 15, ""])
    assert tokens.shape == (4, 16) and tokens.dtype == np.int32
    assert cut == 1
    assert (tokens[:, 0] == tokenizer.bos_token_id).all()
    assert tokens[2, -1] == tokenizer.eos_token_id


def test_tokenizer_folder_problems(tmp_path):
    with pytest.raises(ConfigError, match="expected a CLIP tokenizer in") as error:
        load_tokenizer(tmp_path / "none", 16)
    assert "\n" not in str(error.value)
    tiny.save_tokenizer(tmp_path / "long", max_length=77)
    with pytest.raises(ConfigError, match="has model_max_length 77, more than text_encoder.max_position_embeddings 16"):
        load_tokenizer(tmp_path / "long", 16)
