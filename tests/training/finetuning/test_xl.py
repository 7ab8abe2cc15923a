"""A tiny model of SDXL's shape learns the scenes: both text encoders, pooled text and sizes, from data to image."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline

from latentdiff import Pipeline
from latentdiff.errors import UsageError
from latentdiff.training.data.transforms import told_sizes
from latentdiff.training.finetuning.finetune import run
from latentdiff.training.loss import DenoisingLoss
from latentdiff.training.preferences import PreferenceLoss
from tests import scenes, tiny
from tests.scenes import scene_language
from tests.training.finetuning.build import settings


def scenes_folder(folder: Path, count: int) -> Path:
    folder.mkdir()
    random = Random(0)
    for number in range(count):
        plan, image, _ = scenes.drawn("train", "single", random, size=96)
        image.convert("RGB").save(folder / f"{number:02d}.png")
        (folder / f"{number:02d}.txt").write_text(scene_language.caption(plan, random), encoding="utf-8")
    return folder


def test_a_model_of_its_shape_learns_scenes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scenes_folder(tmp_path / "data", 16)
    model, losses, forward = tiny.xl_folder(tmp_path), [], DenoisingLoss.forward

    def spy(self, batch, step):
        assert batch["sizes"].shape == (len(batch["noise"]), 6)
        found = forward(self, batch, step)
        losses.append(found["mse"].item())
        return found

    monkeypatch.setattr(DenoisingLoss, "forward", spy)
    result = run(
        settings(
            tmp_path, model=str(model), method="full", train_text_encoder=True, resolution=64, max_steps=40, batch_size=4,
            lr=2e-3, warmup_steps=5, ema_decay=0.0, cache_text=False, checkpoint_every=1000,
        )
    )  # fmt: skip
    assert np.mean(losses[-15:]) < 0.85 * np.mean(losses[:5])
    before, after = (Pipeline.load(folder, precision="fp32") for folder in (model, result))
    for name, own in before.text_encoder.named_parameters():
        if "layers.0.mlp.fc1.weight" in name:
            assert not torch.equal(own, after.text_encoder.get_parameter(name)), name  # both encoders learned
    size = {"height": 64, "width": 64}
    (image,) = after("two cats", steps=4, seed=1, progress=False, **size)
    (told,) = after("two cats", steps=4, seed=1, progress=False, original_size=(20, 20), **size)
    assert not np.array_equal(np.asarray(image), np.asarray(told))
    peer = StableDiffusionXLPipeline.from_pretrained(result)
    from latentdiff.diffusion.latents import start_noise

    options = {
        "num_inference_steps": 4,
        "guidance_scale": 5.0,
        "latents": start_noise([1], (4, 8, 8)),
        "output_type": "np",
    }
    (expected,) = peer("two cats", **options, **size).images
    assert np.abs(np.asarray(image) - np.round(expected * 255)).max() <= 1


def test_cached_text_is_that_of_both_encoders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scenes_folder(tmp_path / "data", 4)
    model, seen, forward = tiny.xl_folder(tmp_path), [], DenoisingLoss.forward

    def spy(self, batch, step):
        seen.append(batch["context"])
        return forward(self, batch, step)

    monkeypatch.setattr(DenoisingLoss, "forward", spy)
    run(settings(tmp_path, model=str(model), method="lora", resolution=64, max_steps=1, cache_precision="fp32"))
    captions = [path.read_text(encoding="utf-8") for path in sorted((tmp_path / "data").glob("*.txt"))]
    expected = Pipeline.load(model, precision="fp32").encode(captions)
    for row in seen[0]:
        assert min((row - other).abs().max().item() for other in expected) < 1e-5


@pytest.mark.parametrize("method", ["lora", "full"])
def test_it_learns_from_pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    scenes_folder(tmp_path / "data", 4)
    rows = [{"preferred": f"{n:02d}.png", "rejected": f"{n + 2:02d}.png", "text": "a cat"} for n in range(2)]
    (tmp_path / "data" / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    seen, errors = [], PreferenceLoss.errors
    monkeypatch.setattr(PreferenceLoss, "errors", lambda self, batch: (seen.append(batch), errors(self, batch))[1])
    model = str(tiny.xl_folder(tmp_path))
    run(settings(tmp_path, model=model, method=method, loss="dpo", resolution=64, max_steps=2, batch_size=2, lr=1e-3))
    for batch in seen:
        first, second = batch["sizes"].chunk(2)
        assert batch["sizes"].shape == (4, 6) and torch.equal(first, second)
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in log if "loss" in line]
    assert losses[0] == pytest.approx(0.69315, abs=1e-4) and abs(losses[1] - losses[0]) > 1e-4


def test_the_refiner_is_refused(tmp_path: Path) -> None:
    scenes_folder(tmp_path / "data", 2)
    with pytest.raises(UsageError, match="refiner of SDXL"):
        run(settings(tmp_path, model=str(tiny.refiner_folder(tmp_path)), resolution=64))


@pytest.mark.parametrize(
    ("size", "bucket", "flipped", "expected"),
    [
        ((200, 100), (64, 64), False, (100, 200, 0, 32, 64, 64)),  # 128x64 once scaled, 32 cut off on either side
        ((100, 300), (64, 64), True, (300, 100, 64, 0, 64, 64)),
        ((64, 64), (64, 64), False, (64, 64, 0, 0, 64, 64)),
    ],
)
def test_what_is_told_of_an_image(size, bucket, flipped: bool, expected) -> None:
    assert told_sizes(size, bucket, None, flipped=flipped) == expected


def test_a_mirrored_crop_is_told_from_the_other_side() -> None:
    plain, mirrored = (
        told_sizes((200, 100), (64, 64), (0,), flipped=flip)
        for flip in (False, True)
    )
    assert plain[3] + mirrored[3] == 64 and plain[3] != mirrored[3]
