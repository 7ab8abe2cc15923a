"""The choice among attention kernels, with clocks and kernels that the test knows."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

from latentdiff.errors import MissingDependencyError
from latentdiff.networks.attention import fastest
from latentdiff.networks.attention.fastest import CUDA_CANDIDATES, FastestAttention

Q = torch.randn(2, 3, 20, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def named(name, calls, result=sdpa):
    def function(q, k, v):
        calls.append(name)
        return result(q, k, v)

    return function


def choice(monkeypatch, times, **results):
    """What is called second, when the choice has been made, if the candidates take these times."""
    calls: list[str] = []
    candidates = {name: named(name, calls, results.get(name, sdpa)) for name in times if name != "sdpa"}
    names = {function: name for name, function in candidates.items()}
    monkeypatch.setattr(fastest, "seconds", lambda function, *_: times[names.get(function, "sdpa")])
    attention = FastestAttention(candidates)
    attention(Q, Q, Q)
    calls.clear()
    torch.testing.assert_close(attention(Q, Q, Q), sdpa(Q, Q, Q))
    return calls


def fails(q, k, v):
    raise RuntimeError("No available kernel")


def is_missing(q, k, v):
    raise MissingDependencyError("xformers is not installed")


def test_the_fastest_is_kept(monkeypatch):
    assert choice(monkeypatch, {"sdpa": 1.0, "flash": 0.8, "cudnn": 0.7, "xformers": 0.9}) == ["cudnn"]


def test_small_gains_are_noise(monkeypatch):
    assert choice(monkeypatch, {"sdpa": 1.0, "flash": 0.97}) == []


def is_far_off(q, k, v):
    return sdpa(q, k, v) * 1.1


def is_not_finite(q, k, v):
    return v * torch.nan


@pytest.mark.parametrize("result", [fails, is_missing, is_far_off, is_not_finite])
def test_what_fails_or_is_wrong_is_left_out(monkeypatch, result):
    assert choice(monkeypatch, {"sdpa": 1.0, "flash": 0.1, "cudnn": 0.5}, flash=result) == ["cudnn"]


def test_each_size_and_dtype_is_tried_once():
    calls: list[str] = []
    attention = FastestAttention({"other": named("other", calls)})
    for q in (Q, Q[:1], Q.bfloat16()):
        calls.clear()
        attention(q, q, q)
        assert len(calls) > 1, "tried"
        calls.clear()
        attention(q, q, q)
        assert len(calls) <= 1, "chosen"


def test_nothing_is_tried_under_gradients():
    calls: list[str] = []
    attention = FastestAttention({"other": named("other", calls)})
    with torch.enable_grad():
        attention(Q, Q, Q)
    assert calls == []


def test_pytorchs_own_kernels_agree_or_refuse():
    """Those that a CPU has; the others must raise what the choice expects."""
    attention = FastestAttention(CUDA_CANDIDATES | {"xformers": is_missing})
    torch.testing.assert_close(attention(Q, Q, Q), sdpa(Q, Q, Q))
