"""What the U-Net of an original single file predicts: the noise or the velocity.

Nothing in the shapes tells SD 2.x base (noise) from SD 2.x 768-v (velocity), so the first of these that speaks decides:
the configuration that `convert` stored; the marker tensor `v_pred`; the file's `modelspec` metadata; a YAML
file of the same name beside it (`parameterization: "v"`); the family (SD 1.x predicts noise); the number of training
steps of the published SD 2.0 base; and at last a guess, by asking the network itself.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from latentdiff.checkpoints.files import TensorFile
from latentdiff.errors import CheckpointError
from latentdiff.reading.yaml import read_yaml

_SD2_BASE_STEPS = 875_000  # global_step of 512-base-ema.ckpt
_ARCHITECTURE = "modelspec.architecture"
_NAMES = {"epsilon": "epsilon", "eps": "epsilon", "v": "v_prediction", "v_prediction": "v_prediction"}


@dataclass(frozen=True)
class PredictionType:
    """ "epsilon" or "v_prediction", what it was read from, and whether that is a guess."""

    name: str
    source: str
    guessed: bool = False


def read_prediction_type(file: TensorFile, *, second_family: bool) -> PredictionType | None:
    """What the file itself says; None if only the network can tell. `second_family`: it is an SD 2.x."""
    if "v_pred" in file.tensors:
        return PredictionType("v_prediction", "the marker v_pred")
    stated = file.metadata.get("modelspec.prediction_type", "").lower()
    if stated in _NAMES:
        return PredictionType(_NAMES[stated], "its modelspec metadata")
    if architecture := re.match(r"stable-diffusion-v2-(512|768-v)\b", file.metadata.get(_ARCHITECTURE, "")):
        name = "epsilon" if architecture[1] == "512" else "v_prediction"
        return PredictionType(name, "its modelspec metadata")
    if found := _beside(file):
        return found
    if not second_family:
        return PredictionType("epsilon", "its family")
    if file.others.get("global_step") == _SD2_BASE_STEPS:
        return PredictionType("epsilon", "its number of training steps, that of SD 2.0 base")
    return None


def probe_prediction_type(
    unet: Callable[[Tensor, Tensor, Tensor], Tensor], channels: int, width: int
) -> PredictionType:
    """Ask the network: at the last timestep its input is all but pure noise.

    A network that predicts noise then returns its input (slope 1 of output on input); one that predicts
    v = alpha eps - sigma x0 returns the negative mean picture (slope near alpha, 0.07). The reading is decisive for
    trained networks and means nothing for random ones, so it counts as a guess.

    Args:
        unet: x (1, channels, 8, 8), t (1,), context (1, 2, width) -> prediction (1, channels_out, 8, 8).
        channels: input channels; only the first four are compared.
        width: of the text embeddings.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, channels, 8, 8, generator=generator, dtype=torch.float32)
    context = torch.zeros(1, 2, width, dtype=torch.float32)
    with torch.no_grad():
        out = unet(x, torch.tensor([999]), context).float()
    seen = x[:, : out.shape[1]]
    slope = float((out * seen).sum() / (seen * seen).sum())
    if not math.isfinite(slope):
        return PredictionType(
            "v_prediction", "its family alone, as most SD 2.x do (a trial run gave NaN)", guessed=True
        )
    name = "epsilon" if slope > 0.5 else "v_prediction"
    return PredictionType(name, f"a trial run of the U-Net (slope {slope:.2f} on noise)", guessed=True)


def _beside(file: TensorFile) -> PredictionType | None:
    """The configuration that the original programs need beside an SD 2.x file: same name, .yaml."""
    path = file.path.with_suffix(".yaml")
    if not path.is_file():
        return None
    try:
        parameters = read_yaml(path, CheckpointError)["model"]["params"]
        return PredictionType(_NAMES[parameters.get("parameterization", "eps")], path.name)
    except (CheckpointError, KeyError, TypeError, AttributeError):
        return None
