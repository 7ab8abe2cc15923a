"""What a model draws with in few steps: a LoRA distilled from it, in a folder beside its parts, and the options for it.

MODEL/fast/
    pytorch_lora_weights.safetensors    as diffusers names it: load_lora_weights(MODEL, subfolder="fast")
    sampling.json                       {"sampler": "ddim", "spacing": "trailing", "steps": 8, "guidance_scale": 1.0}
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from latentdiff.checkpoints.hashing import file_hash
from latentdiff.errors import CheckpointError, UsageError
from latentdiff.files import atomic_path
from latentdiff.reading.json import read_object
from latentdiff.request.options import checked

FOLDER = "fast"
LORA_FILE = "pytorch_lora_weights.safetensors"
OPTIONS_FILE = "sampling.json"
OPTIONS = ("sampler", "spacing", "steps", "guidance_scale")


@dataclass(frozen=True)
class Distilled:
    """The LoRA of a model for few steps.

    Attributes:
        lora: its file.
        options: those of `OPTIONS` that it was distilled for, all of them.
    """

    lora: Path
    options: Mapping[str, Any]

    @cached_property
    def sha256(self) -> str:
        """Of the file, 64 hex digits."""
        return file_hash(self.lora)

    def describe(self) -> dict[str, Any]:
        """What recipes say of it; "part" tells it from the LoRAs that a user loads."""
        return {"file": self.lora.name, "sha256": self.sha256, "scale": 1.0, "part": FOLDER}


def read_distilled(folder: Path) -> Distilled | None:
    """What a folder holds, `FOLDER` in that of a model; None where it is not there. The LoRA itself is not read yet.

    Raises:
        CheckpointError: one of its two files is missing, or does not say with which options it goes.
    """
    if not folder.is_dir():
        return None
    for name in (LORA_FILE, OPTIONS_FILE):
        if not (folder / name).is_file():
            raise CheckpointError(
                f"{folder} must hold {LORA_FILE} and {OPTIONS_FILE}; found no {name}: remove the folder"
            )
    path = folder / OPTIONS_FILE
    found = read_object(path)
    if found.keys() != set(OPTIONS) or None in found.values():
        raise CheckpointError(
            f"{path} must say {', '.join(OPTIONS)}, found {', '.join(sorted(found))[:80] or 'nothing'}"
        )
    try:
        return Distilled(folder / LORA_FILE, checked(found))
    except UsageError as error:
        raise CheckpointError(f"{path}: {error}") from error


def write_options(options: Mapping[str, Any], folder: Path) -> None:
    """Write the options beside the LoRA in `folder`."""
    with atomic_path(folder / OPTIONS_FILE) as temporary:
        temporary.write_text(json.dumps(dict(options), indent=2) + "\n", encoding="utf-8")


def copy_distilled(distilled: Distilled, model: Path) -> None:
    """Put a LoRA for few steps with its options into a model's folder."""
    (model / FOLDER).mkdir(parents=True, exist_ok=True)
    with atomic_path(model / FOLDER / LORA_FILE) as temporary:
        shutil.copyfile(distilled.lora, temporary)
    write_options(distilled.options, model / FOLDER)
