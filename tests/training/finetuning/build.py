"""A tiny model and tiny data sets to fine-tune it on."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from latentdiff.checkpoints.components import Components, save_folder
from latentdiff.networks.vae import VAE
from latentdiff.prompts.words import KINDS, Words, as_json
from latentdiff.training.checkpoint import load_checkpoint, newest_checkpoint
from latentdiff.training.finetuning.config import FinetuneConfig, make_config
from latentdiff.training.stages.networks import new_text_encoder, new_unet, seeded
from tests import tiny
from tests.training.build import captioned_folder
from tests.training.build import config as training_config

__all__ = ["captioned_folder", "listing_model", "log_of", "model_folder", "paired_folder", "settings", "state_of"]


@cache
def model_folder(prediction_type: str = "v_prediction", *, inpainting: bool = False) -> Path:
    """A model for 16x16 images with random weights; do not write to it."""
    tmp = Path(_scratch().name) / f"{prediction_type}-{inpainting}"
    model = training_config(tmp).model
    tokenizer = tiny.tokenizer(tmp / "tokenizer", max_length=16)
    parts = Components(
        tokenizer,
        tiny.randomize(new_text_encoder(model.text_encoder, tokenizer, 0), 1),
        tiny.randomize(new_unet(replace(model.unet, in_channels=9) if inpainting else model.unet, 0), 2),
        tiny.randomize(seeded(lambda: VAE(model.vae), 0), 3),
        type(model.schedule)(**{**vars(model.schedule), "prediction_type": prediction_type}),
    )
    save_folder(parts, tmp / "model")
    return tmp / "model"


def listing_model(tmp: Path, words: Sequence[str]) -> Path:
    """The same model, which says that it knows these words."""
    model = shutil.copytree(model_folder(), tmp / "listing")
    known = Words({kind: () for kind in KINDS}, frozenset(words), 16)
    (model / "words.json").write_text(json.dumps(as_json(known)))
    return model


def settings(tmp: Path, **changes: Any) -> FinetuneConfig:
    """A short run in `tmp/run` on `tmp/data`, without images."""
    base = {
        "data": str(tmp / "data"), "model": str(model_folder()), "out": tmp / "run", "method": "lora", "rank": 2,
        "max_steps": 6, "batch_size": 4, "lr": 1e-2, "warmup_steps": 2, "decay": "constant", "sample_count": 0,
        "log_every": 1, "validate_every": 100, "preview_every": 100, "checkpoint_every": 2, "device": "cpu",
    }  # fmt: skip
    return make_config({**base, **changes}, "test")


def state_of(run: Path) -> dict[str, torch.Tensor]:
    """Everything in the newest whole checkpoint of a run."""
    checkpoint = load_checkpoint(newest_checkpoint(run / "checkpoints")[0])
    return {
        **checkpoint.weights,
        **{f"ema {name}": value for name, value in checkpoint.ema.items()},
        **checkpoint.optimizer,
    }


@cache
def _scratch() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="latentdiff-tests-")  # disappears with the process


def paired_folder(folder: Path, count: int) -> Path:
    """So many pairs of the images of `captioned_folder`: the cat preferred for one half of the prompts, the dog for the
    other."""
    captioned_folder(folder, 2 * count)
    rows = [
        {
            "preferred": f"{2 * pair + pair % 2}.png",
            "rejected": f"{2 * pair + 1 - pair % 2}.png",
            "text": f"a photo of the {('dog', 'cat')[pair % 2]} {'and ' * (pair // 2)}",
        }
        for pair in range(count)
    ]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def log_of(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's log."""
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
