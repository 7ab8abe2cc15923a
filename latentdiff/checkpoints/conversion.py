"""Converting a model between the diffusers folder and the original single file, without loss either way."""

from __future__ import annotations

import os
from pathlib import Path

from latentdiff.checkpoints.folder import read_folder, write_folder
from latentdiff.checkpoints.hub import locate
from latentdiff.checkpoints.original import read_original, write_original
from latentdiff.checkpoints.raw import RawModel
from latentdiff.diffusion.config import PREDICTION_TYPES
from latentdiff.errors import CheckpointError, UsageError

_PICKLES = (".ckpt", ".pt", ".pth", ".bin")


def read_model(source: str | os.PathLike[str], *, ema: bool = False, prediction_type: str | None = None) -> RawModel:
    """Map a model in whichever layout it lies: a folder, a hub id, or an original single file.

    Args:
        source: where it is.
        ema: take the averaged weights of a single file that holds both.
        prediction_type: what the U-Net predicts, where the model does not say or says it wrong.

    Raises:
        UsageError: `prediction_type` is none of the three.
        CheckpointError: nothing is there, or it is damaged, something else, or has no averaged weights.
    """
    if prediction_type not in (None, *PREDICTION_TYPES):
        raise UsageError(f"unknown prediction type {prediction_type!r}; choose from {', '.join(PREDICTION_TYPES)}")
    path = locate(source)
    if path.is_file():
        return read_original(path, ema=ema, prediction_type=prediction_type)
    if ema:
        raise CheckpointError(f"{path} is a folder, which holds one set of weights; load it without ema")
    raw = read_folder(path)
    if prediction_type:
        raw.configs["scheduler"]["prediction_type"] = prediction_type
    return raw


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    ema: bool = False,
    prediction_type: str | None = None,
) -> list[str]:
    """Convert a folder to a single `.safetensors` file, or a single file to a folder.

    Every tensor keeps its bits and its type. What the other layout has no place for is kept in the file's
    metadata (configuration, tokenizer) or in `original_extras.safetensors` (a training schedule, averaged
    weights), so that converting back gives the same tensors again.

    Args:
        source: a folder in the diffusers layout, a hub id, or an original single file.
        target: a name that ends in `.safetensors`, or that of a folder.
        ema: take the averaged weights as the weights.
        prediction_type: see `read_model`.

    Returns:
        What the user should know: guesses, and parts that were left out.

    Raises:
        UsageError: source and target have the same layout, or the target is a pickle.
        CheckpointError: the source is no model, or the target holds something else.
    """
    target = Path(target)
    if target.suffix in _PICKLES:
        raise UsageError(f"{target}: pickles are read, not written; give a name that ends in .safetensors")
    to_file = target.suffix == ".safetensors"
    raw = read_model(source, ema=ema, prediction_type=prediction_type)
    if to_file != raw.source.is_dir():
        layout = "a single file" if to_file else "a folder"
        raise UsageError(f"{source} is {layout} already; expected a target in the other layout, found {target}")
    if to_file:
        write_original(raw, target)
    else:
        write_folder(raw, target)
    left_out = [f"{', '.join(raw.left_out)} left out: not used here"] if raw.left_out else []
    return raw.warnings + left_out
