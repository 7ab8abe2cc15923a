import pytest
import torch
from torch.nn import Parameter

from latentdiff.training.ema import EMA


def test_average_follows_its_closed_form():
    parameter = Parameter(torch.zeros(3))
    ema = EMA({"p": parameter}, decay=0.5)
    expected = 0.0
    for step in range(12):
        with torch.no_grad():
            parameter.fill_(step + 1.0)
        ema.update(step)
        keep = min(0.5, (2 + step) / (11 + step))
        expected = keep * expected + (1 - keep) * (step + 1)
        assert ema.average["p"].tolist() == pytest.approx([expected] * 3)


def test_rare_updates_forget_as_much_as_frequent_ones():
    parameter = Parameter(torch.ones(1))
    often, rarely = EMA({"p": parameter}, 0.9, every=1), EMA({"p": parameter}, 0.9, every=5)
    with torch.no_grad():
        parameter.zero_()
    for step in range(100, 200):
        often.update(step)
        rarely.update(step)
    assert rarely.average["p"].item() == pytest.approx(often.average["p"].item(), rel=1e-4)
    assert often.average["p"].item() == pytest.approx(0.9**100, rel=1e-4)


def test_between_updates_nothing_happens():
    parameter = Parameter(torch.ones(1))
    ema = EMA({"p": parameter}, 0.9, every=4)
    with torch.no_grad():
        parameter.zero_()
    for step in range(3):
        ema.update(step)
        assert ema.average["p"].item() == 1.0
    ema.update(3)
    assert ema.average["p"].item() < 1.0


def test_swapped_in_and_back_even_after_an_error():
    parameter = Parameter(torch.ones(2))
    ema = EMA({"p": parameter}, 0.9)
    with torch.no_grad():
        parameter.fill_(3.0)
    with pytest.raises(RuntimeError, match="inside"), ema.swapped_in():
        assert parameter.tolist() == [1.0, 1.0]
        raise RuntimeError("inside")
    assert parameter.tolist() == [3.0, 3.0]
    assert ema.average["p"].tolist() == [1.0, 1.0]
