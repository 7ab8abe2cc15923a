"""Diffusion-DPO: its loss by the equation of the paper on diffusers' networks, and whole runs."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch.func import functional_call

from latentdiff.errors import ConfigError, DataError
from latentdiff.training.finetuning.finetune import run
from latentdiff.training.finetuning.preparation import Preparation, make_accelerator
from latentdiff.training.finetuning.trial import dry_run
from latentdiff.training.preferences import PreferenceLoss
from tests.training.finetuning.build import captioned_folder, model_folder, paired_folder, settings, state_of

BETA = 300.0


@pytest.fixture
def tmp(tmp_path):
    paired_folder(tmp_path / "data", 6)
    return tmp_path


def log_of(run):
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def prepared(tmp, **changes):
    """The trainer of a run, inside everything that it computes in."""
    (tmp / "run").mkdir()
    accelerator, of = make_accelerator(settings(tmp, loss="dpo", dpo_beta=BETA, cache_precision="fp32", **changes))
    made = Preparation(of, accelerator)
    made.read_data()
    made.build_caches()
    return made


def as_trained(module, amount=0.02):
    """Move what is trained away from the start."""
    random = torch.Generator().manual_seed(0)
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for parameter in trained.values():
            parameter.add_(amount * torch.randn(parameter.shape, generator=random))
    return trained


def batch_of(trainer, rows):
    return {name: torch.from_numpy(array) for name, array in trainer.task.batch(0, rows).items()}


def paper_loss(predict, scheduler, batch, kind):
    """Equation 14 of Wallace et al. 2023, one pair after the other; T and the weights of noise levels are part of beta.

    Args:
        predict: (x_t, t, text, whether by the start model) -> what the network says.
    """
    losses = []
    for row in range(len(batch["noise"])):
        noise, t, text = (batch[name][row : row + 1] for name in ("noise", "timesteps", "context"))
        errors = {}
        for half, latents in (("w", batch["latents"]), ("l", batch["rejected_latents"])):
            x0 = latents[row : row + 1]
            x_t = scheduler.add_noise(x0, noise, t)
            target = noise if kind == "epsilon" else scheduler.get_velocity(x0, noise, t)
            for start in (False, True):
                errors[half, start] = (target - predict(x_t, t, text, start)).pow(2).mean()
        ours, theirs = errors["w", False] - errors["l", False], errors["w", True] - errors["l", True]
        losses.append(-torch.log(torch.sigmoid(-BETA / 2 * (ours - theirs))))
    return torch.stack(losses).mean()


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_loss_and_gradients_are_those_of_the_paper(tmp, kind):
    """The LoRA's weights are put into diffusers' U-Net by hand; the start model is diffusers' alone."""
    made = prepared(tmp, model=str(model_folder(kind)))
    peer = UNet2DConditionModel.from_pretrained(model_folder(kind) / "unet").eval()
    scheduler = DDPMScheduler.from_pretrained(model_folder(kind) / "scheduler")
    with made.computing(), made.trainer() as trainer:
        module = trainer.task.module
        trained = as_trained(module)
        batch = batch_of(trainer, range(4))
        found = module(batch, 0)
        gradients = torch.autograd.grad(found["loss"], list(trained.values()))

        def changed():
            weights = dict(peer.named_parameters())
            for name, layer in made.method.lora.layers.items():
                key = f"{name.removeprefix('unet.')}.weight"
                weights[key] = weights[key] + layer.lora_up.weight @ layer.lora_down.weight
            return weights

        def predict(x, t, text, start):
            weights = dict(peer.named_parameters()) if start else changed()
            return functional_call(peer, weights, (x, t, text)).sample

        expected = paper_loss(predict, scheduler, batch, kind)
        of_peer = torch.autograd.grad(expected, list(trained.values()))
    assert abs(expected.item() - torch.log(torch.tensor(2.0)).item()) > 0.01
    assert found["loss"].item() == pytest.approx(expected.item(), abs=1e-5)
    for one, other in zip(gradients, of_peer, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5 * max(1.0, other.abs().max().item()))


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_all_weights_are_compared_with_those_of_the_start(tmp, precision):
    """bf16: what autocast keeps of the start model's weights must not serve the trained one."""
    made = prepared(tmp, method="full", mixed_precision=precision)
    peer = UNet2DConditionModel.from_pretrained(model_folder() / "unet").eval()
    with made.computing(), made.trainer() as trainer:
        module, batch = trainer.task.module, batch_of(trainer, range(4))
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            assert module(batch, 0)["loss"].item() == pytest.approx(0.693147, abs=1e-6)
        trained = as_trained(module, 0.005)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            found = module(batch, 0)
        gradients = torch.autograd.grad(found["loss"], list(trained.values()))
        moved = UNet2DConditionModel.from_pretrained(model_folder() / "unet").eval()
        moved.load_state_dict(module.unet.state_dict())
        scheduler = DDPMScheduler.from_pretrained(model_folder() / "scheduler")
        expected = paper_loss(
            lambda x, t, text, start: (peer if start else moved)(x, t, text).sample, scheduler, batch, "v_prediction"
        )
        of_peer = torch.autograd.grad(expected, [moved.get_parameter(name.removeprefix("unet.")) for name in trained])
    close = 1e-4 if precision == "no" else 0.3
    assert found["loss"].item() == pytest.approx(expected.item(), rel=close, abs=1e-5)
    whole, other = (torch.cat([g.flatten() for g in each]) for each in (gradients, of_peer))
    assert torch.nn.functional.cosine_similarity(whole, other, dim=0) > (0.9999 if precision == "no" else 0.9)


def test_an_adapter_of_the_text_encoder_is_off_in_the_start_model(tmp):
    made = prepared(tmp, targets=["text_encoder"], cache_latents=False)
    with made.computing(), made.trainer() as trainer:
        module, batch = trainer.task.module, batch_of(trainer, range(4))
        assert "tokens" in batch and "rejected_images" in batch
        _, at_start = module._errors(batch)
        as_trained(module, 0.1)
        now, before = module._errors(batch)
    assert torch.equal(before, at_start) and not torch.allclose(now, before, rtol=1e-4)


def test_both_halves_get_the_same_noise_and_what_is_told(tmp, monkeypatch):
    seen, plain = [], PreferenceLoss.errors
    monkeypatch.setattr(PreferenceLoss, "errors", lambda self, batch: (seen.append(batch), plain(self, batch))[1])
    made = prepared(tmp)
    with made.computing(), made.trainer() as trainer:
        batch = batch_of(trainer, range(4))
        trainer.task.module(batch, 0)
    assert len(seen) == 2  # the start model and the trained one
    for both in seen:
        for name in ("noise", "timesteps", "context"):
            first, second = both[name].chunk(2)
            assert torch.equal(first, second) and torch.equal(first, batch[name])
        first, second = both["latents"].chunk(2)
        assert torch.equal(first, batch["latents"]) and torch.equal(second, batch["rejected_latents"])
        assert not torch.allclose(first, second)


def test_micro_batches_give_the_same_steps(tmp):
    for out, more in (("one", {}), ("four", {"accumulation": 4})):
        run(settings(tmp, loss="dpo", dpo_beta=BETA, out=tmp / out, max_steps=3, lr=1e-3, **more))
    first, second = state_of(tmp / "one"), state_of(tmp / "four")
    for name in first:
        torch.testing.assert_close(second[name], first[name], rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("method", ["lora", "full"])
def test_gone_on_with_it_is_the_run_that_was_not_stopped(tmp, method):
    options = {"loss": "dpo", "dpo_beta": BETA, "method": method, "lr": 1e-3, "keep": "old", "cache": tmp / "cache"}
    run(settings(tmp, out=tmp / "whole", max_steps=6, **options))
    run(settings(tmp, out=tmp / "parts", max_steps=2, **options))
    run(settings(tmp, out=tmp / "parts", max_steps=6, **options))
    whole, parts = state_of(tmp / "whole"), state_of(tmp / "parts")
    assert whole.keys() == parts.keys()
    for name in whole:
        assert torch.equal(whole[name], parts[name]), name


def test_it_learns_to_tell_pairs_apart_and_says_so(tmp):
    options = {"validation_share": 0.3, "validate_every": 20, "ema_decay": 0.0, "method": "full"}
    result = run(settings(tmp, loss="dpo", dpo_beta=BETA, max_steps=40, lr=1e-3, **options))
    log = log_of(tmp / "run")
    measured = [line for line in log if "val_dpo" in line]
    assert result.is_dir() and [line["step"] for line in measured] == [0, 20, 40]
    assert measured[0]["val_accuracy"] == 0.5 and measured[0]["val_dpo"] == pytest.approx(0.69315, abs=1e-4)
    assert measured[0]["val_margin"] == 0 and "val_0_199" in measured[0] and "kept" in measured[0]
    assert measured[-1]["train_accuracy"] > 0.8 and measured[-1]["train_dpo"] < 0.5 and measured[-1]["val_dpo"] < 0.6
    steps = [line for line in log if "loss" in line]
    assert {"accuracy", "margin", "preferred_change", "rejected_change", "mse"} <= steps[0].keys()
    page = (tmp / "run" / "report.html").read_text()
    assert "of held-out pairs are told apart rightly" in page and "pairs of images" in page


def test_pairs_of_one_prompt_are_held_out_together(tmp):
    rows = [json.loads(line) for line in (tmp / "data" / "metadata.jsonl").read_text().splitlines()]
    for row in rows:
        row["text"] = row["text"].split()[4]  # two prompts in all
    (tmp / "data" / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = prepared(tmp, validation_share=0.3)
    samples, held_out = made.material.held_out
    assert len(held_out) == 3 and len({samples.data.captions[index] for index in held_out}) == 1


def test_it_is_tried_out_and_stops_by_itself(tmp):
    assert dry_run(settings(tmp, loss="dpo", max_steps=4)).fits and not (tmp / "run").exists()
    options = {"stop": "auto", "validate_every": 2, "patience": 2, "least_kept": 0.0, "validation_share": 0.3}
    run(settings(tmp, loss="dpo", dpo_beta=2000, lr=0.3, max_steps=40, **options))
    assert log_of(tmp / "run")[-1]["step"] < 40


def test_pairs_and_single_images_are_not_confused(tmp):
    with pytest.raises(DataError, match="holds pairs.*--loss dpo"):
        run(settings(tmp))
    captioned_folder(tmp / "single", 4)
    with pytest.raises(DataError, match="expected pairs of images.*preferred, rejected and text"):
        run(settings(tmp, loss="dpo", data=str(tmp / "single")))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "textual_inversion", "word": "<x>"}, "goes with lora and full"),
        ({"min_snr_gamma": 5.0}, "counts all timesteps the same"),
        ({"masks": "alpha"}, "leave out masks"),
        ({"stream": True}, "leave out stream"),
        ({"method": "full", "prediction_type": "epsilon"}, "compares it with the start"),
        ({"data": [{"path": "x", "regularization": True}]}, "keep: old"),
    ],
)
def test_what_does_not_go_together(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        settings(tmp_path, loss="dpo", **changes)


def test_its_defaults_and_its_own_key(tmp_path):
    from latentdiff.training.finetuning.config import make_config

    made = {method: make_config({"loss": "dpo", "method": method}, "test") for method in ("lora", "full")}
    assert (made["lora"].lr, made["full"].lr, made["lora"].caption_dropout) == (1e-4, 1e-5, 0.0)
    assert make_config({"loss": "dpo", "lr": 1e-2}, "test").lr == 1e-2
    with pytest.raises(ConfigError, match="goes with loss dpo"):
        make_config({"dpo_beta": 10}, "test")
