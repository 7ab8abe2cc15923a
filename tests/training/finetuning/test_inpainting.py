"""Fine-tuning of models for inpainting: what they see, against diffusers, and whole runs."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from latentdiff import Pipeline, inpaint
from latentdiff.errors import ConfigError, UsageError
from latentdiff.training.data import read_dataset
from latentdiff.training.data.randomness import generator
from latentdiff.training.finetuning.finetune import resolve, run
from latentdiff.training.finetuning.trial import dry_run
from latentdiff.training.holes import Holes, random_hole
from latentdiff.training.loss import DenoisingLoss
from latentdiff.training.masks import Masks
from tests import peers
from tests.training.finetuning.build import model_folder, settings, state_of
from tests.training.finetuning.test_parity import step_of_ours


def inpainting(tmp, **changes):
    return settings(tmp, model=str(model_folder(inpainting=True)), **changes)


# --- What the model sees


def test_the_input_and_a_step_are_those_of_diffusers(tmp_path, monkeypatch):
    from diffusers import StableDiffusionInpaintPipeline
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    def cells(size, random):  # where a cell is painted as a whole, all ways to make a mask of latents agree
        return np.kron(random.random((size[1] // 8, size[0] // 8)) < 0.4, np.ones((8, 8), bool))

    monkeypatch.setattr("latentdiff.training.holes.random_hole", cells)
    seen, join = [], DenoisingLoss._with_hole

    def spy(self, noisy, batch):
        seen.append((join(self, noisy, batch), batch))
        return seen[-1][0]

    monkeypatch.setattr(DenoisingLoss, "_with_hole", spy)
    batch, ours = step_of_ours(tmp_path, "inpaint", monkeypatch, method="full")
    (input_of_ours,) = [found for found, told in seen if "holes" in told]

    pipe = StableDiffusionInpaintPipeline.from_pretrained(peers.folder("inpaint"), safety_checker=None)
    noises = [batch["seen_noise"], batch["posterior"]]

    def sample(self, generator=None):
        return self.mean + self.std * noises.pop(0)

    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", sample)
    image = pipe.image_processor.preprocess(batch["images"].permute(0, 3, 1, 2).float() / 255)
    mask = pipe.mask_processor.preprocess(batch["holes"].float())
    with torch.no_grad():
        small, masked = pipe.prepare_mask_latents(
            mask, image * (mask < 0.5), len(mask), 64, 64, torch.float32, torch.device("cpu"), None, False
        )
        latents = pipe._encode_vae_image(image, generator=None)
        context = pipe.text_encoder(batch["tokens"][:, 0])[0]
    noisy = pipe.scheduler.add_noise(latents, batch["noise"], batch["timesteps"])
    input_of_theirs = torch.cat([noisy, small, masked], 1)
    assert 0 < small.mean() < 1
    torch.testing.assert_close(input_of_ours, input_of_theirs, rtol=0, atol=2e-5)

    pipe.unet.requires_grad_(True)
    named = dict(pipe.unet.named_parameters())
    F.mse_loss(pipe.unet(input_of_theirs, batch["timesteps"], context).sample, batch["noise"]).backward()
    norm = torch.nn.utils.clip_grad_norm_(named.values(), 0.5)
    for name, parameter in named.items():
        gradient = ours.optimizer[f"unet.{name}/exp_avg"] / 0.1
        assert (gradient - parameter.grad).norm() <= 1e-5 * max(norm, 1), name


def test_without_an_image_everything_is_hidden(tmp, monkeypatch):
    """What the model knew is measured where it sees nothing, as a pipeline of diffusers with a white mask would show it."""
    seen, join = [], DenoisingLoss._with_hole
    monkeypatch.setattr(DenoisingLoss, "_with_hole", lambda *args: seen.append(join(*args)) or seen[-1])
    run(inpainting(tmp, max_steps=1))
    pipe = Pipeline.load(model_folder(inpainting=True), device="cpu", precision="fp32")
    grey = pipe.vae.encode(torch.zeros(1, 3, 16, 16)).mode()
    assert seen[0].shape[1] == 9 and (seen[0][:, 4] == 1).all()
    torch.testing.assert_close(seen[0][:, 5:], grey.expand(len(seen[0]), -1, -1, -1), rtol=1e-4, atol=1e-5)


# --- Holes


def test_random_holes_follow_their_key_alone_and_a_quarter_hides_everything():
    made = [random_hole((40, 24), generator(0, "hole", number)) for number in range(400)]
    assert all(hole.shape == (24, 40) and hole.any() for hole in made)
    again = [random_hole((40, 24), generator(0, "hole", number)) for number in range(400)]
    assert all(np.array_equal(a, b) for a, b in zip(made, again, strict=True))
    shares = np.array([hole.mean() for hole in made])
    assert abs((shares == 1).mean() - 0.25) < 0.07  # three standard deviations
    assert len({hole.tobytes() for hole in made}) > 280 and np.ptp(shares[shares < 1]) > 0.4
    assert (np.mean(made, 0) > 0.3).all()  # every place is in many holes


def test_masks_that_are_given_are_what_is_painted(tmp):
    (tmp / "masks").mkdir()
    for number in range(10):
        mask = np.zeros((16, 16), np.uint8)
        mask[:, 8:] = 255
        Image.fromarray(mask).save(tmp / "masks" / f"{number}.png")
    masks = Masks.find(read_dataset([tmp / "data"]), str(tmp / "masks"), 0.0)
    hole = Holes(0, masks).pixels(0, (16, 16), (0, "any"))
    assert hole[:, 8:].all() and not hole[:, :8].any()
    run(inpainting(tmp, masks=str(tmp / "masks"), max_steps=1, flip=True))


# --- Runs


def test_a_run_lowers_the_loss_and_its_lora_changes_what_is_painted(tmp):
    result = run(
        inpainting(
            tmp, max_steps=60, rank=8, targets=["attention", "convolutions"], validation_share=0.2, validate_every=60,
            checkpoint_every=60, sample_count=1, sample_steps=2, preview_every=60,
        )
    )  # fmt: skip
    entries = [json.loads(line) for line in (tmp / "run" / "log.jsonl").read_text().splitlines()]
    for name in ("train_mse", "val_mse"):
        losses = [entry[name] for entry in entries if name in entry]
        assert len(losses) == 2 and losses[1] < 0.9 * losses[0]
    folder = tmp / "run" / "samples" / "step-00000060" / "ema"
    seen, made = (np.asarray(Image.open(folder / name)) for name in ("00-hint.png", "00.png"))
    hole = (seen == 127).all(-1)
    assert hole.any() and np.array_equal(seen[~hole], made[~hole])  # what it sees stays
    use = json.loads((tmp / "run" / "result.json").read_text())["use"]
    assert use.startswith("latentdiff inpaint IMAGE 'a photo of the ") and use.endswith(
        f"--mask MASK --model {model_folder(inpainting=True)} --lora {result}"
    )
    pipe = Pipeline.load(model_folder(inpainting=True), device="cpu")
    image, mask = Image.new("RGB", (16, 16), "red"), Image.new("L", (16, 16), 255)
    mask.paste(0, (0, 0, 4, 16))
    before = np.asarray(inpaint(pipe, image, mask, "cat", seed=0, steps=2, progress=False)[0])
    pipe.load_lora(result)
    after = np.asarray(inpaint(pipe, image, mask, "cat", seed=0, steps=2, progress=False)[0])
    assert not np.array_equal(before, after)


def test_all_weights_are_trained_and_resumed_exactly(tmp):
    every = {"method": "full", "keep": "old", "cache_latents": False, "flip": True, "crop": "random"}
    for name, steps in (("whole", 4), ("parts", 2)):
        result = run(inpainting(tmp, out=tmp / name, max_steps=steps, **every))
    run(resolve(tmp / "parts", None, {"max_steps": 4}))
    whole, parts = state_of(tmp / "whole"), state_of(tmp / "parts")
    assert all(torch.equal(value, parts[name]) for name, value in whole.items())
    assert Pipeline.load(result, device="cpu").is_for_inpainting


def test_it_stops_by_itself_and_can_be_tried_out(tmp):
    auto = {"stop": "auto", "patience": 1, "validate_every": 2, "max_steps": 4, "lr": 1e-9}
    assert dry_run(inpainting(tmp, **auto)).fits
    run(inpainting(tmp, **auto))
    assert json.loads((tmp / "run" / "result.json").read_text())["why"]


def test_what_cannot_be_trained_is_said_first(tmp):
    with pytest.raises(
        UsageError, match="a ControlNet is trained beside a text-to-image model, found one for inpainting"
    ):
        run(inpainting(tmp, method="controlnet", control_kind="canny"))
    with pytest.raises(UsageError, match="loss dpo compares whole images, found a model for inpainting"):
        run(inpainting(tmp, loss="dpo", out=tmp / "pairs"))
    with pytest.raises(UsageError, match="a model for inpainting have the size of their image and no width"):
        run(inpainting(tmp, sample_options=["width=32"], sample_count=1, out=tmp / "other"))
    with pytest.raises(UsageError, match="found one that follows instructions about an image"):
        run(settings(tmp, model=str(peers.folder("pix2pix")), out=tmp / "third"))
    with pytest.raises(ConfigError, match="unmasked_weight goes with masks"):
        inpainting(tmp, unmasked_weight=0.5)
