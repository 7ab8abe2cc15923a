"""Asking the U-Net of a model what it predicts."""

from __future__ import annotations

import torch
from torch import Tensor

from latentdiff.checkpoints.families import REFINER, family_with
from latentdiff.checkpoints.hashing import remembered
from latentdiff.checkpoints.modules import build_module, parse_config
from latentdiff.checkpoints.prediction import PredictionType, probe_prediction_type
from latentdiff.checkpoints.raw import RawModel
from latentdiff.networks.layers import SizedText


def probed(raw: RawModel, *, second_family: bool) -> PredictionType:
    """Run the U-Net once; half precision is widened to bfloat16, which CPUs compute at a bearable speed.

    What a large file showed is remembered.
    """
    kept = remembered(raw.weight_files[0], "predicts", lambda: _probe(raw, second_family).to_text())
    return PredictionType.from_text(kept)


def _probe(raw: RawModel, second_family: bool) -> PredictionType:
    types = {tensor.dtype for tensor in raw.tensors["unet"].values()}
    unet = build_module(raw, "unet", torch.float32 if types & {torch.float32, torch.float64} else torch.bfloat16)
    dtype = next(unet.parameters()).dtype
    config = parse_config("unet", raw.configs["unet"])

    count = config.class_dim or (1 if config.num_class_embeds else 5 if family_with(raw.parts) is REFINER else 6)
    is_told = config.class_dim or config.num_class_embeds or config.added_dim
    told = torch.zeros(1, count)

    def run(x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        text = context.to(dtype)
        return unet(x.to(dtype), t, SizedText(text, told) if is_told else text)

    return probe_prediction_type(run, config.in_channels, config.cross_attention_dim, second_family=second_family)
