"""One optimizer step against diffusers, transformers and torch on the same model, batch, noise and timesteps."""

import pytest
import torch
from torch.nn import functional as F

from latentdiff.training.checkpoint import load_checkpoint, newest_checkpoint
from latentdiff.training.finetuning.finetune import run
from latentdiff.training.loss import DenoisingLoss
from tests import peers
from tests.training.finetuning.build import captioned_folder, settings

LR = 1e-4


def step_of_ours(tmp, family, monkeypatch, **changes):
    """Run one step; returns the batch that it saw and the checkpoint after it."""
    captioned_folder(tmp / "data", 6)
    batches, forward = [], DenoisingLoss.forward

    def spy(self, batch, step):
        batches.append({name: tensor.clone() for name, tensor in batch.items()})
        return forward(self, batch, step)

    monkeypatch.setattr(DenoisingLoss, "forward", spy)
    run(
        settings(
            tmp, model=str(peers.folder(family)), resolution=64, upscale=True, max_steps=1, lr=LR, warmup_steps=0,
            grad_clip=0.5, cache_latents=False, cache_text=False, caption_dropout=0.3, **changes,
        )
    )  # fmt: skip
    return batches[0], load_checkpoint(newest_checkpoint(tmp / "run" / "checkpoints")[0])


def loss_of_theirs(pipe, batch, gamma, *, train_text=False):
    """The recipe of diffusers' text-to-image training, in its own words."""
    from diffusers import DDPMScheduler
    from diffusers.training_utils import compute_snr

    scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    pixels = batch["images"].permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        found = pipe.vae.encode(pixels).latent_dist
        latents = (found.mean + found.std * batch["posterior"]) * pipe.vae.config.scaling_factor
    with torch.set_grad_enabled(train_text):
        context = pipe.text_encoder(batch["tokens"][:, 0])[0]
    noisy = scheduler.add_noise(latents, batch["noise"], batch["timesteps"])
    target = batch["noise"]
    if scheduler.config.prediction_type == "v_prediction":
        target = scheduler.get_velocity(latents, batch["noise"], batch["timesteps"])
    prediction = pipe.unet(noisy, batch["timesteps"], context).sample
    errors = F.mse_loss(prediction, target, reduction="none").flatten(1).mean(1)
    if gamma is None:
        return errors.mean()
    snr = compute_snr(scheduler, batch["timesteps"])
    weights = torch.stack([snr, gamma * torch.ones_like(snr)], dim=1).min(dim=1)[0]
    weights = weights / (snr + 1 if scheduler.config.prediction_type == "v_prediction" else snr)
    return (weights * errors).mean()


@pytest.mark.parametrize(("family", "gamma"), [("sd1", None), ("sd2", 5.0)])
def test_full_training_equals_diffusers_and_torch(tmp_path, monkeypatch, family, gamma):
    batch, ours = step_of_ours(tmp_path, family, monkeypatch, method="full", min_snr_gamma=gamma)
    pipe = peers.theirs.__wrapped__(family)
    pipe.unet.train().requires_grad_(True)
    named = dict(pipe.unet.named_parameters())
    groups = [
        {"params": [p for p in named.values() if p.ndim > 1], "weight_decay": 0.01},
        {"params": [p for p in named.values() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.999))
    loss_of_theirs(pipe, batch, gamma).backward()
    norm = torch.nn.utils.clip_grad_norm_(named.values(), 0.5)
    assert norm > 0.5  # so that clipping is compared too
    optimizer.step()

    assert set(ours.weights) == {f"unet.{name}" for name in named}
    for name, parameter in named.items():
        gradient = ours.optimizer[f"unet.{name}/exp_avg"] / 0.1
        assert (gradient - parameter.grad).norm() <= 1e-5 * norm, name
        # Of a whole tensor: Adam's first step divides each gradient by its own size, also those that are rounding
        # alone.
        theirs = parameter.detach()
        assert (ours.weights[f"unet.{name}"] - theirs).norm() <= 1e-5 * theirs.norm(), name


def test_the_text_encoder_gets_the_gradient_of_transformers(tmp_path, monkeypatch):
    batch, ours = step_of_ours(tmp_path, "sd1", monkeypatch, method="full", train_text_encoder=True, min_snr_gamma=None)
    pipe = peers.theirs.__wrapped__("sd1")
    pipe.text_encoder.requires_grad_(True)
    loss_of_theirs(pipe, batch, None, train_text=True).backward()
    named = {
        name.removeprefix("text_model."): p for name, p in pipe.text_encoder.named_parameters() if p.grad is not None
    }
    parameters = [*named.values(), *pipe.unet.parameters()]
    norm = torch.nn.utils.clip_grad_norm_(parameters, 0.5)
    for name, parameter in named.items():
        gradient = ours.optimizer[f"text_encoder.text_model.{name}/exp_avg"] / 0.1
        assert (gradient - parameter.grad).norm() <= 1e-5 * norm, name
