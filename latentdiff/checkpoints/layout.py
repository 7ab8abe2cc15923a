"""Where the diffusers folder layout keeps weights; and asking the disk for them before anybody can read them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from latentdiff.reading.plain import exists

PARTS = ("unet", "vae", "text_encoder")  # that most models have; see `families`
STEMS = {
    "unet": ("diffusion_pytorch_model",),
    "vae": ("diffusion_pytorch_model",),
    "text_encoder": ("model", "pytorch_model"),
    "text_encoder_2": ("model", "pytorch_model"),
}
# Of unCLIP models: what they see images with.
BESIDE = {"image_encoder": ("model", "pytorch_model"), "image_normalizer": ("diffusion_pytorch_model",)}


def weight_candidates(part: str) -> Iterator[str]:
    """Where a part's weights may lie, best first: plain before fp16, safetensors before .bin, whole before sharded."""
    for variant in ("", ".fp16"):
        for suffix in (".safetensors", ".bin"):
            for stem in {**STEMS, **BESIDE}[part]:
                yield f"{part}/{stem}{variant}{suffix}"
                yield f"{part}/{stem}{suffix}.index{variant}.json"
                if variant:
                    yield f"{part}/{stem}{variant}{suffix}.index.json"


def read_ahead(source: Path) -> None:
    """Have the system fetch the weights of a model into memory while this process goes on.

    Called before torch is imported, the disk works meanwhile. What is no model, sharded, or on a system that cannot be
    asked, is left alone: nothing depends on this but time.
    """
    if not hasattr(os, "posix_fadvise"):
        return
    if not exists(source):
        return
    candidates = (
        [[source]] if source.is_file() else [[source / name for name in weight_candidates(part)] for part in STEMS]
    )
    for paths in candidates:
        path = next((path for path in paths if path.is_file()), None)
        if path and path.suffix != ".json":
            with open(path, "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)
