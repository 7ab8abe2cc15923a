"""What dropout leaves out: the shares that are asked for, the same however a batch is split, and what kohya's equations say."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from latentdiff.adapters.lora.kinds.new import NEW, Shape
from latentdiff.training.dropout import Dropout, random_bits

ROWS = torch.arange(40, 52)
LAYERS = {
    "linear": (lambda: nn.Linear(24, 32), (12, 5, 24)),
    "linear without tokens": (lambda: nn.Linear(24, 32), (12, 24)),
    "convolution": (lambda: nn.Conv2d(24, 32, 3, padding=1), (12, 24, 6, 6)),
    "text in two chunks": (lambda: nn.Linear(24, 32), (24, 5, 24)),
}


def made(kind: str, layer: str):
    torch.manual_seed(0)
    target, shape = LAYERS[layer][0](), LAYERS[layer][1]
    change = NEW[kind](target, Shape(4, 2.0), torch.Generator().manual_seed(0))
    for parameter in change.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return target, change, torch.randn(shape)


@torch.no_grad()
def added(dropout: Dropout, target, change, x, *, step=3, rows=ROWS, name="unet.a"):
    with dropout.drawing(step, rows):
        return dropout.added(name, change, target, x, 1.0)


def test_bits_are_uniform_and_independent():
    drawn = random_bits(2**62 + 12345, torch.arange(64), 4096)
    assert drawn.min() >= 0 and drawn.max() < 2**32
    uniform = drawn.double() / 2**32
    counts = torch.histc(uniform, 64, 0, 1)
    assert (
        (counts - 4096).square() / 4096
    ).sum() < 120  # chi-square of 63 degrees of freedom: 1 in 100,000 is above 122
    other = random_bits(2**62 + 12346, torch.arange(64), 4096).double() / 2**32
    pairs = [
        (uniform[:, :-1], uniform[:, 1:]),
        (uniform[:-1], uniform[1:]),
        (uniform, other),
        (uniform[:, :-64], uniform[:, 64:]),
    ]
    for first, second in pairs:
        correlation = torch.corrcoef(torch.stack([first.flatten(), second.flatten()]))[0, 1]
        assert abs(correlation) < 5 / first.numel() ** 0.5
    for bit in range(32):
        assert abs((drawn >> bit & 1).double().mean() - 0.5) < 0.005, bit


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("kind", NEW)
def test_inputs_are_left_out_and_the_others_count_more(kind, layer):
    """The change is linear in its input, so what is left out can be read from it: it must be that of a masked input."""
    target, change, x = made(kind, layer)
    seen = []
    linear = change.added
    change.added = lambda of, inputs, strength: seen.append(inputs) or linear(of, inputs, strength)
    found = added(Dropout(1, inputs=0.25), target, change, x)
    (masked,) = seen
    kept = masked != 0
    torch.testing.assert_close(masked[kept], x[kept] / 0.75)
    assert abs(kept.float().mean() - 0.75) < 5 * (0.25 * 0.75 / x.numel()) ** 0.5
    assert len({tuple(row.flatten().tolist()) for row in kept}) == len(x)
    torch.testing.assert_close(found, linear(target, masked, 1.0))


@pytest.mark.parametrize("layer", LAYERS)
def test_ranks_are_left_out_for_each_sample(layer):
    """kohya's scripts: up(down(x) * mask) * alpha / rank / (1 - share), a mask of ranks for each sample."""
    target, change, x = made("lora", layer)
    found = added(Dropout(1, ranks=0.5), target, change, x)
    chunks = len(x) // len(ROWS)
    masks = set()
    for place in range(len(x)):
        one, h = found[place : place + 1], change.lora_down(x[place : place + 1])
        axis = 1 if isinstance(target, nn.Conv2d) else -1
        candidates = [[bool(number >> bit & 1) for bit in range(4)] for number in range(16)]
        shape = [1] * h.ndim
        shape[axis] = 4
        fitting = [
            mask
            for mask in candidates
            if torch.allclose(
                one, change.lora_up(h * torch.tensor(mask).view(shape)) * (0.5 / 0.5), rtol=1e-4, atol=1e-6
            )
        ]
        assert len(fitting) == 1
        masks.add((place // chunks, *fitting[0]))
    assert len(masks) == len(ROWS)  # one for each sample, for all of its chunks
    assert len({mask[1:] for mask in masks}) > 3


@pytest.mark.parametrize("kind", NEW)
def test_layers_are_left_out_by_step(kind):
    target, change, x = made(kind, "linear")
    dropout, whole = Dropout(1, layers=0.3), change.added(target, x).detach()
    dropped = 0
    for step in range(60):
        for name in ("unet.a", "unet.b"):
            found = added(dropout, target, change, x, step=step, name=name)
            if not found.any():
                dropped += 1
            else:
                torch.testing.assert_close(found, whole)
    assert abs(dropped / 120 - 0.3) < 4 * (0.21 / 120) ** 0.5


@pytest.mark.parametrize("shares", [{"inputs": 0.3}, {"ranks": 0.3}, {"inputs": 0.2, "ranks": 0.2}])
@pytest.mark.parametrize("layer", LAYERS)
def test_parts_of_a_batch_see_the_same(layer, shares):
    target, change, x = made("lora", layer)
    dropout, each = Dropout(1, **shares), len(x) // len(ROWS)
    whole = added(dropout, target, change, x)
    parts = [
        added(dropout, target, change, x[each * n : each * n + 3 * each], rows=ROWS[n : n + 3]) for n in range(0, 12, 3)
    ]
    torch.testing.assert_close(torch.cat(parts), whole)
    others = [{"step": 4}, {"name": "unet.b"}, {"rows": ROWS + 1}]
    assert not any(torch.equal(whole, added(dropout, target, change, x, **other)) for other in others)
    assert not torch.equal(whole, added(Dropout(2, **shares), target, change, x))


def test_nothing_is_left_out_outside():
    target, change, x = made("lora", "linear")
    dropout = Dropout(1, inputs=0.5, ranks=0.5, layers=0.5)
    assert torch.equal(dropout.added("a", change, target, x, 1.0), change.added(target, x))
