"""Taps read and replace, and leave no trace."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from latentdiff.errors import UsageError
from latentdiff.networks.taps import Tap, find_module


@pytest.fixture
def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.Tanh(), nn.Linear(4, 2)))


X = torch.linspace(-1, 1, 6).view(2, 3)


def hooks(net):
    return [(dict(m._forward_hooks), dict(m._forward_pre_hooks), dict(m.__dict__["_modules"])) for m in net.modules()]


def test_reads_arguments_and_output_without_changing_them(net):
    plain, seen = net(X), {}
    with Tap(net, ["0", "1.1"], output=lambda name, arguments, output: seen.update({name: (arguments, output)})):
        assert net(X).equal(plain)
    assert list(seen) == ["0", "1.1"]
    assert seen["0"][0][0].equal(X)
    assert seen["1.1"][1].equal(plain)


def test_replaces_output(net):
    with Tap(net, ["1.0"], output=lambda name, arguments, output: torch.ones_like(output)):
        assert net(X).equal(net[1][1](torch.ones(2, 4)))


def test_replaces_arguments(net):
    with Tap(net, ["0"], arguments=lambda name, arguments: (2 * arguments[0],)):
        doubled = net(X)
    assert doubled.equal(net(2 * X))


def test_gradients_pass_through(net):
    shift = torch.zeros(4, requires_grad=True)
    with Tap(net, ["0"], output=lambda name, arguments, output: output + shift):
        (gradient,) = torch.autograd.grad(net(X).sum(), shift)
    assert gradient.abs().sum() > 0


def test_taps_nest_on_one_module_and_the_last_sees_what_the_first_made(net):
    with Tap(net, ["0"], output=lambda *a: a[-1] + 1), Tap(net, ["0"], output=lambda *a: 10 * a[-1]):
        assert torch.equal(net(X), net[1](10 * (net[0].forward(X) + 1)))


def test_leaves_no_trace_after_use_and_after_exceptions(net):
    kept = net[0].register_forward_hook(lambda module, arguments, output: None)
    before, plain = hooks(net), net(X)

    def fail(name, arguments, output):
        raise ValueError("on purpose")

    tap = Tap(net, ["0", "1"], output=fail, arguments=lambda name, arguments: None)
    for _ in range(2):  # a tap can be used again
        with pytest.raises(ValueError, match="on purpose"), tap:
            net(X)
        assert hooks(net) == before
    assert net(X).equal(plain)
    kept.remove()


def test_a_tap_in_force_cannot_be_entered_again(net):
    with Tap(net, ["0"], output=lambda *a: None) as tap:
        with pytest.raises(RuntimeError, match="in force"):
            tap.__enter__()
        assert len(net[0]._forward_hooks) == 1
    assert not net[0]._forward_hooks


def test_an_unknown_name_is_refused_with_names_like_it(net):
    with pytest.raises(UsageError, match="found '1.2'; names like it: 1.1"):
        Tap(net, ["1.2"])
    assert find_module(net, "1.1") is net[1][1]
