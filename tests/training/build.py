"""Tiny data sets and configurations of training runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from latentdiff.training.data import Dataset
from latentdiff.training.data.entries import Entry
from latentdiff.training.stages.config import TrainingConfig, validate_config
from tests.tiny import save_tokenizer

RESOLUTION = 16


def captioned_folder(folder: Path, count: int, *, seed: int = 0) -> Path:
    """White squares on red ("cat") and blue ("dog"), 16x16, with captions, in the Hugging Face layout."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(seed)
    lines = []
    for index in range(count):
        image = np.empty((RESOLUTION, RESOLUTION, 3), np.uint8)
        image[:] = (220, 30, 30) if index % 2 else (30, 30, 220)
        top, left = random.integers(0, 9, 2)
        image[top : top + 7, left : left + 7] = 255
        Image.fromarray(image).save(folder / f"{index}.png")
        lines.append(
            json.dumps({"file_name": f"{index}.png", "text": f"a photo of the {'cat' if index % 2 else 'dog'}"})
        )
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def values(tmp: Path, **changes: Any) -> dict[str, Any]:
    """Values of a run in `tmp/run`; `changes` are merged into its sections."""
    stage = {
        "max_steps": 6, "batch_size": 4, "lr": 2e-3, "warmup_steps": 2, "mixed_precision": "no", "log_every": 2,
        "validate_every": 100, "validation_images": 4, "preview_every": 100, "checkpoint_every": 3, "ema_every": 2,
    }  # fmt: skip
    made = {
        "run": str(tmp / "run"),
        "model": {
            "tokenizer": str(tmp / "tokenizer"),
            "vae": {"latent_channels": 4, "block_out_channels": [8, 16, 16], "layers_per_block": 1, "norm_num_groups": 4,
                    "sample_size": RESOLUTION},
            "unet": {"sample_size": 4, "block_out_channels": [16, 32], "layers_per_block": 1, "attention_levels": [False, True],
                     "num_heads": [1, 2], "cross_attention_dim": 16, "norm_num_groups": 8},
            "text_encoder": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32,
                             "max_position_embeddings": 16},
            "schedule": {"prediction_type": "v_prediction", "set_alpha_to_one": True, "steps_offset": 0},
        },
        "data": {"train": str(tmp / "train"), "validation": str(tmp / "held-out"), "resolution": RESOLUTION},
        "vae": {**stage, "crop": 8},
        "diffusion": {**stage, "sample_count": 0},
    }  # fmt: skip
    for section, entries in changes.items():
        made[section] = {**made.get(section, {}), **entries} if isinstance(entries, dict) else entries
    return made


def prepared(tmp: Path, *, images: int = 12) -> Path:
    """Make the data sets and the tokenizer that `values` names; returns `tmp`."""
    captioned_folder(tmp / "train", images)
    captioned_folder(tmp / "held-out", 4, seed=1)
    save_tokenizer(tmp / "tokenizer", max_length=16)
    return tmp


class Nowhere:
    """The origin of an image that nobody reads."""

    def stamp(self) -> str:
        return "0"


def dataset(captions: list[str]) -> Dataset:
    """Images `0.png`, `1.png` ... that are only named."""
    count = len(captions)
    entries = [Entry(f"{index}.png", (caption,), Nowhere()) for index, caption in enumerate(captions)]
    return Dataset(entries, [(RESOLUTION, RESOLUTION)] * count, ["0"] * count, [1] * count, [1.0] * count)


def config(tmp: Path, **changes: Any) -> TrainingConfig:
    """A validated configuration of `values`."""
    return validate_config(values(tmp, **changes), "test")
