"""Joining and splitting what steers a U-Net."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor

from latentdiff.networks.conditioning import Conditioning, Ragged, by_groups
from latentdiff.networks.unet import UNet
from tests import peers


@cache
def unet() -> UNet:
    return peers.ours("sd1").unet


def conditioning(count: int, length: int, seed: int, **fields: Tensor) -> Conditioning:
    text = torch.randn(count, length, 32, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return Conditioning.of(unet(), text, **fields)


def test_equal_lengths_become_one_batch():
    one, two = conditioning(2, 7, 0), conditioning(1, 7, 1)
    both = Conditioning.cat([one, two])
    assert isinstance(both, Conditioning) and len(both) == 3
    assert torch.equal(both.text, torch.cat([one.text, two.text])) and both.extra_channels is None
    keys = next(iter(both.projected))
    assert torch.equal(both.projected[keys][0][:2], one.projected[keys][0])


def test_every_field_is_joined():
    one, two = (conditioning(1, 7, seed, extra_channels=torch.full((1, 5, 8, 8), float(seed))) for seed in (0, 1))
    assert Conditioning.cat([one, two]).extra_channels[:, 0, 0, 0].tolist() == [0.0, 1.0]


def test_unequal_lengths_run_apart_and_come_back_in_order():
    parts = [conditioning(1, 7, 0), conditioning(2, 14, 1), conditioning(1, 7, 2)]
    joined = Conditioning.cat(parts)
    assert isinstance(joined, Ragged) and len(joined) == 4
    twice = Conditioning.cat([joined, joined])
    assert len(twice) == 8 and len(twice.groups()) == 2
    calls = []

    def call(x: Tensor, part: Conditioning) -> Tensor:
        calls.append(len(x))
        return 10.0 * x + part.text[:, :1, 0]

    x = torch.arange(8.0)[:, None]
    first = torch.cat([part.text[:, :1, 0] for part in parts])
    torch.testing.assert_close(by_groups(twice, x, call), 10.0 * x + torch.cat([first, first]))
    assert sorted(calls) == [4, 4]


@pytest.mark.parametrize("length", [7, 14])
@torch.no_grad()
def test_a_row_does_not_depend_on_its_neighbours_length(length):
    network, mine = unet(), conditioning(1, length, 3)
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    joined = Conditioning.cat([mine, conditioning(1, 21, 4)])
    found = by_groups(joined, torch.cat([x, x]), lambda x, part: network(x, 500.0, part.context_in(x.dtype, 500.0, network)))
    assert torch.equal(found[:1], network(x, 500.0, mine.text))
