from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ResNetConfig, ResNetModel

from latentdiff.errors import ConfigError
from latentdiff.networks.vae import VAE
from latentdiff.training.data.transforms import to_bytes, to_signed
from latentdiff.training.stages.config import VAEStageSection
from latentdiff.training.stages.networks import seeded
from latentdiff.training.stages.vae import VAELoss, VAETask, measure_scaling_factor
from tests.training.build import RESOLUTION, config, dataset


@pytest.fixture
def vae(tmp_path):
    return seeded(lambda: VAE(config(tmp_path).model.vae), 0)


def section(**changes):
    return VAEStageSection(**{"max_steps": 10, "batch_size": 4, "lr": 1e-3, "crop": 8, **changes})


def some_images(count=6, size=RESOLUTION):
    return np.random.default_rng(0).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def task(vae, images=None, *, decoder_only=False, **changes):
    images = some_images() if images is None else images
    data = dataset(["an image"] * len(images))
    return VAETask(vae, section(**changes), data, images, images, seed=0, decoder_only=decoder_only)


def tensors(batch):
    return {name: torch.tensor(array) for name, array in batch.items()}


def test_crops_lie_on_the_grid_of_the_latents_in_the_named_images(vae):
    # The value of each pixel tells where it is: image, row, column.
    images = np.zeros((6, RESOLUTION, RESOLUTION, 3), np.uint8)
    images[..., 0] = np.arange(6)[:, None, None]
    images[..., 1] = np.arange(RESOLUTION)[:, None]
    images[..., 2] = np.arange(RESOLUTION)
    made = task(vae, images)
    corners = set()
    for step in range(60):
        batch = made.batch(step, range(4))["images"]
        assert [f"{crop[0, 0, 0]}.png" for crop in batch] == made.sources(step)
        for crop in batch:
            top, left = crop[0, 0, 1:]
            assert np.array_equal(crop[..., 1], np.arange(top, top + 8)[:, None].repeat(8, 1))
            corners.add((int(top), int(left)))
    assert {top for top, _ in corners} == {left for _, left in corners} == {0, 4, 8}


def test_loss_is_the_sum_that_the_settings_say(vae):
    weights = {"l1_weight": 0.5, "mse_weight": 2.0, "gradient_weight": 0.25, "kl_weight": 0.01}
    made = task(vae, **weights)
    batch = tensors(made.batch(0, range(4)))
    parts = made.module(batch, 0)
    images = to_signed(batch["images"])
    distribution = vae.encode(images)
    error = vae.decode(distribution.sample(batch["noise"])) - images
    l1, mse = error.abs().mean(), (error**2).mean()
    edges = (error[..., 1:] - error[..., :-1]).abs().mean() + (error[..., 1:, :] - error[..., :-1, :]).abs().mean()
    standard = torch.distributions.Normal(0.0, 1.0)
    divergence = torch.distributions.kl_divergence(
        torch.distributions.Normal(distribution.mean, (distribution.logvar / 2).exp()), standard
    ).mean()
    expected = 0.5 * l1 + 2 * mse + 0.25 * edges + 0.01 * divergence
    assert parts["loss"].item() == pytest.approx(expected.item(), rel=1e-4)


def test_decoder_only_leaves_the_encoder_alone(vae):
    made = task(vae, decoder_only=True)
    (group,) = made.parameter_groups()
    assert {name.split(".")[1] for name in group.parameters} == {"decoder", "post_quant_conv"}
    made.module(tensors(made.batch(0, range(4))), 0)["loss"].backward()
    assert all(parameter.grad is None for parameter in vae.encoder.parameters())
    assert vae.decoder.conv_in.weight.grad.abs().sum() > 0


def test_the_discriminator_waits_for_its_start(vae):
    made = task(vae, adversarial_weight=0.1, adversarial_start=5)
    batch = tensors(
        {**made.batch(0, range(4)), "images": some_images(4, 48), "noise": np.zeros((4, 4, 12, 12), np.float32)}
    )
    assert "discriminator" not in made.module(batch, 4)
    assert {"discriminator", "adversarial"} <= made.module(batch, 5).keys()
    assert [group.name for group in made.parameter_groups()] == ["vae", "discriminator"]
    assert made.averaged() == {"vae"}


def test_adversarial_gradients_go_where_they_should(vae):
    """The autoencoder hears only the verdict, the discriminator only its own hinge loss."""
    loss = VAELoss(vae, section(adversarial_weight=1.0), decoder_only=False)
    images = to_signed(torch.tensor(some_images(2, 48)))
    made = (images * 0.5).requires_grad_()
    parts = loss._adversarial(made, images)
    parts["adversarial"].backward(retain_graph=True)
    assert all(parameter.grad is None for parameter in loss.discriminator.parameters())
    heard = made.grad.clone()
    assert heard.abs().sum() > 0
    parts["discriminator"].backward()
    assert torch.equal(made.grad, heard)
    assert all(parameter.grad is not None for parameter in loss.discriminator.parameters())
    real, fake = loss.discriminator(images), loss.discriminator(made)
    hinge = 0.5 * ((1 - real).clamp(min=0).mean() + (1 + fake).clamp(min=0).mean())
    assert parts["discriminator"].item() == pytest.approx(hinge.item(), rel=1e-5)
    assert parts["adversarial"].item() == pytest.approx(-fake.mean().item(), rel=1e-5)


def test_perceptual_term_is_zero_for_equal_images_and_trains(vae, tmp_path):
    ResNetModel(ResNetConfig(embedding_size=4, hidden_sizes=[8, 8], depths=[1, 1])).save_pretrained(tmp_path / "net")
    loss = VAELoss(vae, section(perceptual_weight=1.0, perceptual_network=tmp_path / "net"), decoder_only=False)
    images = to_signed(torch.tensor(some_images(2, 32)))
    assert loss.features(images, images).item() == 0
    other = images.flip(0).requires_grad_()
    loss.features(other, images).backward()
    assert other.grad.abs().sum() > 0
    assert not any(name.startswith("features") for name, p in loss.named_parameters() if p.requires_grad)


def test_perceptual_network_that_is_none(vae, tmp_path):
    with pytest.raises(ConfigError, match="is no transformers vision model") as error:
        VAELoss(vae, section(perceptual_weight=1.0, perceptual_network=tmp_path), decoder_only=False)
    assert "\n" not in str(error.value)


def test_scaling_factor_gives_latents_of_unit_variance(vae):
    images = some_images(64)
    scale = measure_scaling_factor(vae, images, seed=0)
    again = VAE(replace(vae.config, scaling_factor=scale))
    again.load_state_dict(vae.state_dict())
    with torch.inference_mode():
        distribution = again.encode(to_signed(torch.tensor(images)))
        noise = torch.randn(distribution.mean.shape, generator=torch.Generator().manual_seed(1))
    assert distribution.sample(noise).std().item() == pytest.approx(1.0, abs=0.02)


def test_validation_measures_decibels(vae, monkeypatch):
    made = task(vae)
    monkeypatch.setattr(VAE, "decode", lambda self, z: made.wrong)
    made.wrong = to_signed(torch.tensor(some_images())) + 10 * 2 / 255  # ten grey levels off, before clipping
    psnr = made.validate()["psnr"]
    exact = np.clip(some_images().astype(int) + 10, 0, 255) - some_images()
    assert psnr == pytest.approx(np.mean([10 * np.log10(255**2 / (e**2).mean()) for e in exact]), abs=1e-3)


@pytest.mark.parametrize("count", [1, 5, 24])
def test_sheet_of_reconstructions(vae, tmp_path, count):
    made = task(vae, some_images(count))
    with torch.inference_mode():
        made.preview(tmp_path, 7)
    sheet = np.asarray(Image.open(tmp_path / "step-00000007.png"))
    assert np.array_equal(sheet[:RESOLUTION, :RESOLUTION], some_images(count)[0])
    assert sheet.shape[1] % (2 * RESOLUTION) == 0


def test_bytes_and_back():
    images = torch.tensor(some_images())
    assert torch.equal(to_bytes(to_signed(images)), images.permute(0, 3, 1, 2))
    assert to_bytes(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]
