"""What the U-Net of an original single file predicts: the noise or the velocity.

Nothing in the shapes tells noise from velocity, so the first of these that speaks decides: the configuration that
`convert` stored; the marker tensor `v_pred`; the file's `modelspec` metadata; a YAML file of the same name beside it
(`parameterization: "v"`); the number of training steps of the published SD 2.0 base; and at last the network itself is
asked. SD 1.x predicts noise unless that trial says clearly that it was retrained.
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
_LAST, _EARLY = 999, 250  # timesteps
_EARLY_SIGMA = 0.57  # share of noise at that timestep of Stable Diffusion's schedule
_BETWEEN = 0.5  # slopes that tell one from the other
_ARCHITECTURE = "modelspec.architecture"
_NAMES = {"epsilon": "epsilon", "eps": "epsilon", "v": "v_prediction", "v_prediction": "v_prediction"}


@dataclass(frozen=True)
class PredictionType:
    """ "epsilon" or "v_prediction", what it was read from, and whether that is a guess."""

    name: str
    source: str
    guessed: bool = False

    def to_text(self) -> str:
        """As `from_text` reads it."""
        return f"{self.name}|{int(self.guessed)}|{self.source}"

    @classmethod
    def from_text(cls, text: str) -> PredictionType:
        """Inverse of `to_text`."""
        name, guessed, source = text.split("|", 2)
        return cls(name, source, guessed == "1")


def read_prediction_type(file: TensorFile) -> PredictionType | None:
    """What the file itself says; None if only the network can tell."""
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
    if file.others.get("global_step") == _SD2_BASE_STEPS:
        return PredictionType("epsilon", "its number of training steps, that of SD 2.0 base")
    return None


def probe_prediction_type(
    unet: Callable[[Tensor, Tensor, Tensor], Tensor], channels: int, width: int, *, second_family: bool = True
) -> PredictionType:
    """Ask the network: at the last timestep its input is all but pure noise.

    A network that predicts noise then returns its input (slope 1 of output on input); one that predicts
    v = alpha eps - sigma x0 returns the negative mean image (slope near alpha, 0.07). The reading is decisive for
    trained networks and means nothing for random ones, so it counts as a guess.

    SD 1.x as published predicts noise. It was retrained only if a second reading says so, too: of a grey image under
    little noise, where the slope on the noise is again alpha, there near 1, for v, and 1 for noise.

    Args:
        unet: x (1, channels, 8, 8), t (1,), context (1, 2, width) -> prediction (1, channels_out, 8, 8).
        channels: input channels; only the first four are compared.
        width: of the text embeddings.
        second_family: it is an SD 2.x, most of which predict v.
    """
    slope = _slope(unet, channels, width, _LAST, 1.0)
    if not math.isfinite(slope):
        if not second_family:
            return PredictionType("epsilon", "its family")
        return PredictionType(
            "v_prediction", "its family alone, as most SD 2.x do (a trial run gave NaN)", guessed=True
        )
    if second_family or slope > _BETWEEN:
        name = "epsilon" if slope > _BETWEEN else "v_prediction"
        source = f"a trial run of the U-Net (slope {slope:.2f} on noise)"
        return PredictionType(name, source, guessed=second_family)
    second = _slope(unet, channels, width, _EARLY, _EARLY_SIGMA)
    if second > _BETWEEN:
        source = f"a trial run of the U-Net (slopes {slope:.2f} and {second:.2f} on noise)"
        return PredictionType("v_prediction", source, guessed=True)
    return PredictionType("epsilon", "its family")


@torch.no_grad()
def _slope(unet: Callable[[Tensor, Tensor, Tensor], Tensor], channels: int, width: int, t: int, sigma: float) -> float:
    """Of the output on noise, for a grey image with this much of it."""
    noise = torch.randn(1, channels, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    out = unet(sigma * noise, torch.tensor([t]), torch.zeros(1, 2, width, dtype=torch.float32)).float()
    seen = noise[:, : out.shape[1]]
    return float((out * seen).sum() / (seen * seen).sum())


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
