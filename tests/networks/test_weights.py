"""The hash of a network's weights."""

from __future__ import annotations

import torch
from torch import nn

from latentdiff.networks.weights import weights_hash


def test_it_changes_with_every_weight_and_with_nothing_else():
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).bfloat16()
    before = weights_hash(layer)
    assert len(before) == 16 and weights_hash(layer.float()) == before
    assert weights_hash(layer, "more") != before
    for name, tensor in layer.state_dict().items():
        kept = tensor.clone()
        tensor += 1
        assert weights_hash(layer) != before, name
        tensor.copy_(kept)
    assert weights_hash(layer) == before
    only = weights_hash(layer, only=("0.",))
    layer[1].bias.data += 1
    assert weights_hash(layer, only=("0.",)) == only
