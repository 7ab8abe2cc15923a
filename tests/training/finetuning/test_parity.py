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


# --- SDXL -----------------------------------------------------------------------------------------


def loss_of_sdxl(pipe, batch):
    """The equation of diffusers' training of SDXL: both texts, pooled text and sizes as `added_cond_kwargs`."""
    pixels = batch["images"].permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        found = pipe.vae.encode(pixels).latent_dist
        latents = (found.mean + found.std * batch["posterior"]) * pipe.vae.config.scaling_factor
    states, tokens = [], batch["tokens"][:, 0]
    end = pipe.tokenizer.eos_token_id
    for number, encoder in enumerate((pipe.text_encoder, pipe.text_encoder_2)):
        after_end = (tokens == end).cumsum(1) > 1
        own = tokens.masked_fill(after_end, pipe.tokenizer_2.pad_token_id) if number else tokens
        out = encoder(own, output_hidden_states=True)
        states.append(out.hidden_states[-2])
    added = {"text_embeds": out[0], "time_ids": batch["sizes"]}
    noisy = pipe.scheduler.add_noise(latents, batch["noise"], batch["timesteps"])
    prediction = pipe.unet(noisy, batch["timesteps"], torch.cat(states, 2), added_cond_kwargs=added).sample
    return F.mse_loss(prediction, batch["noise"])


def test_a_step_of_sdxl_equals_diffusers_and_torch(tmp_path, monkeypatch):
    batch, ours = step_of_ours(
        tmp_path,
        "xl",
        monkeypatch,
        method="full",
        train_text_encoder=True,
        min_snr_gamma=None,
        crop="random",
        flip=True,
    )
    assert batch["sizes"].shape == (len(batch["noise"]), 6) and len(batch["sizes"].unique()) > 2
    pipe = peers.theirs.__wrapped__("xl")
    parts = {"unet": pipe.unet, "text_encoder": pipe.text_encoder, "text_encoder_2": pipe.text_encoder_2}
    for part in parts.values():
        part.requires_grad_(True)
    loss_of_sdxl(pipe, batch).backward()
    named = {(part, name): p for part, m in parts.items() for name, p in m.named_parameters() if p.grad is not None}
    norm = torch.nn.utils.clip_grad_norm_(named.values(), 0.5)
    for (part, name), parameter in named.items():
        bare = part == "unet" or name.startswith(("text_model.", "text_projection"))
        full = f"unet.{name}" if part == "unet" else f"text_encoder.{part}.{name if bare else f'text_model.{name}'}"
        gradient = ours.optimizer[f"{full}/exp_avg"] / 0.1
        assert (gradient - parameter.grad).norm() <= 1e-5 * norm, name


def test_a_lora_of_sdxl_gets_the_gradient_of_peft(tmp_path, monkeypatch):
    """From the second step on, as the first moves the upper halves alone: what was read is what diffusers adapts."""
    from diffusers.utils import convert_state_dict_to_diffusers  # noqa: F401 - peft is needed for it

    batch, ours = step_of_ours(
        tmp_path, "xl", monkeypatch, method="lora", targets=["attention", "text_encoder"], rank=2, min_snr_gamma=None
    )
    pipe = peers.theirs.__wrapped__("xl")
    pipe.load_lora_weights(tmp_path / "run" / "lora.safetensors", adapter_name="a")
    parts = {"unet": pipe.unet, "text_encoder": pipe.text_encoder, "text_encoder_2": pipe.text_encoder_2}
    up = {}
    for part, module in parts.items():
        for name, parameter in module.named_parameters():
            is_up = ".lora_B." in name
            parameter.requires_grad_(is_up)
            if is_up:
                parameter.data.zero_()  # where the step began
                up[part, name.split(".lora_B.")[0]] = parameter
    assert not any("layers.2." in name for part, name in up if part == "text_encoder")  # not read
    assert {part for part, _ in up} == set(parts)
    loss_of_sdxl(pipe, batch).backward()
    norm = torch.nn.utils.clip_grad_norm_(up.values(), 0.5)
    for (part, name), parameter in up.items():
        bare = part == "unet" or name.startswith("text_model.")
        full = f"{part}.{name}" if bare else f"{part}.text_model.{name}"
        gradient = ours.optimizer[f"{full}.lora_up.weight/exp_avg"] / 0.1
        assert (gradient - parameter.grad).norm() <= 1e-4 * norm, name
