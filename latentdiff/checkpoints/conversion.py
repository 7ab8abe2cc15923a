"""Converting a model between the diffusers folder and the original single file, without loss either way."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latentdiff.checkpoints.distilled import FOLDER
from latentdiff.checkpoints.families import family_in
from latentdiff.checkpoints.files import read_tensors
from latentdiff.checkpoints.folder import read_folder, write_folder
from latentdiff.checkpoints.hub import locate
from latentdiff.checkpoints.parts import PartWeights, held_parts, read_part, with_parts
from latentdiff.checkpoints.raw import RawModel
from latentdiff.diffusion.config import PREDICTION_TYPES
from latentdiff.errors import CheckpointError, UsageError
from latentdiff.networks.text_encoders import SECOND

_PICKLES = (".ckpt", ".pt", ".pth", ".bin")


@dataclass(frozen=True)
class Choices:
    """What is taken otherwise than a model's files say.

    Attributes:
        ema: take the averaged weights of a single file that holds both.
        prediction_type: what the U-Net predicts, where the model does not say or says it wrong.
        zero_terminal_snr: the schedule ends in pure noise (Lin et al. 2023), where the model does not say.
        vae, text_encoder: where these parts lie, in place of the model's own.
        base: a model that the parts come from that are nowhere else.
    """

    ema: bool = False
    prediction_type: str | None = None
    zero_terminal_snr: bool = False
    vae: str | os.PathLike[str] | None = None
    text_encoder: str | os.PathLike[str] | None = None
    base: str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        if self.prediction_type not in (None, *PREDICTION_TYPES):
            choices = ", ".join(PREDICTION_TYPES)
            raise UsageError(f"unknown prediction type {self.prediction_type!r}; choose from {choices}")


def read_model(source: str | os.PathLike[str], choices: Choices = Choices()) -> RawModel:  # noqa: B008 - immutable
    """Map a model in whichever layout it lies: a folder, a hub id, or an original single file.

    Raises:
        CheckpointError: nothing is there, or it is damaged, something else, lacks a part, or has no averaged weights.
    """
    path = locate(source)
    given = {
        part: read_part(place, part, read_model)
        for part, place in (("vae", choices.vae), ("text_encoder", choices.text_encoder))
        if place is not None
    }
    if path.is_file():
        raw = _read_file(path, choices, given)
    elif choices.ema:
        raise CheckpointError(f"{path} is a folder, which holds one set of weights; load it without ema")
    else:
        raw = read_folder(path)
    if "text_encoder" in given and SECOND in raw.tensors:
        raise UsageError(
            f"{path} is Stable Diffusion XL, whose text encoders cannot be replaced; leave out --text-encoder"
        )
    raw = with_parts(raw, given)
    if choices.prediction_type:
        raw.configs["scheduler"]["prediction_type"] = choices.prediction_type
    if choices.zero_terminal_snr:
        from latentdiff.checkpoints.schedules import ZERO_TERMINAL_SNR

        raw.configs["scheduler"] |= ZERO_TERMINAL_SNR
    return raw


def _read_file(path: Path, choices: Choices, given: Mapping[str, PartWeights]) -> RawModel:
    """A single file; what it lacks comes from the base."""
    from latentdiff.checkpoints.original import assembled, read_original
    from latentdiff.checkpoints.prediction import read_prediction_type
    from latentdiff.checkpoints.prefixes import unwrapped
    from latentdiff.checkpoints.schedules import stored_schedule

    file = read_tensors(path)
    tensors = unwrapped(file.tensors)
    held = held_parts(tensors)
    parts = family_in(tensors).parts
    missing = [part for part in parts if part not in held and part not in given]
    is_whole = len(held) == len(parts)
    if is_whole or not held or (choices.base is None and missing):
        return read_original(path, ema=choices.ema, prediction_type=choices.prediction_type)  # or it says what is wrong
    own = {part: read_part(path, part, read_model) for part in held}
    stated = read_prediction_type(file) if "unet" in held else None
    if choices.base is None:
        raw = assembled(path, {**own, **given}, choices.prediction_type or (stated.name if stated else None))
    else:
        raw = with_parts(read_model(choices.base), own)
        raw.source = path
        raw.configs["scheduler"] |= {"prediction_type": stated.name} if stated else {}
    if "unet" in held:
        raw.configs["scheduler"] |= stored_schedule(tensors)
    return raw


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    **choices: Any,
) -> list[str]:
    """Convert a folder to a single `.safetensors` file, or a single file to a folder.

    Every tensor keeps its bits and its type. What the other layout has no place for is kept in the file's
    metadata (configuration, tokenizer, words) or in `original_extras.safetensors` (a training schedule, averaged
    weights), so that converting back gives the same tensors again.

    Args:
        source: a folder in the diffusers layout, a hub id, or an original single file.
        target: a name that ends in `.safetensors`, or that of a folder.
        choices: what is taken otherwise than the files say, the fields of `Choices`.

    Returns:
        What the user should know: guesses, and parts that were left out.

    Raises:
        UsageError: source and target have the same layout, or the target is a pickle.
        CheckpointError: the source is no model, or the target holds something else.
    """
    from latentdiff.checkpoints.original import write_original

    target = Path(target)
    if target.suffix in _PICKLES:
        raise UsageError(f"{target}: pickles are read, not written; give a name that ends in .safetensors")
    to_file = target.suffix == ".safetensors"
    raw = read_model(source, Choices(**choices))
    if to_file != raw.source.is_dir():
        layout = "a single file" if to_file else "a folder"
        raise UsageError(f"{source} is {layout} already; expected a target in the other layout, found {target}")
    if to_file:
        write_original(raw, target)
    else:
        write_folder(raw, target)
    left_out = [f"{', '.join(raw.left_out)} left out: the result cannot hold them"] if raw.left_out else []
    if raw.distilled and to_file:
        left_out.append(
            f"{FOLDER}/ left out, as a single file has no place for it: --fast draws without the model's LoRA"
        )
    return raw.warnings + left_out
