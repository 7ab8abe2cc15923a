"""The choice between forms, with clocks and forms that the test knows; and oneDNN's product where torch lacks it."""

from __future__ import annotations

import json

import pytest
import torch
from torch.nn import functional as F

from latentdiff.errors import UsageError
from latentdiff.networks import kernels
from latentdiff.networks.kernels import Choices

ONE = torch.ones(4)


@pytest.fixture
def clock(monkeypatch):
    """Time passes only where a form says so."""
    now = [0.0]
    monkeypatch.setattr(kernels, "_busy", lambda: now[0])
    monkeypatch.setattr(kernels.time, "perf_counter", lambda: now[0])
    return now


def forms(clock, plain=0.001, fast=0.001, result=ONE):
    def form(seconds, out):
        def compute():
            clock[0] += seconds
            if isinstance(out, Exception):
                raise out
            return out

        return compute

    return lambda: (form(plain, ONE), form(fast, result))


def never():
    raise AssertionError("this was tried")


def test_the_faster_form_is_chosen_and_remembered_on_disk(tmp_path, clock):
    path = tmp_path / "deep" / "forms.jsonl"
    choices = Choices(path)
    assert choices.is_fast("a", forms(clock, fast=0.0005))
    assert not choices.is_fast("b", forms(clock, fast=0.002))
    for again in (choices, Choices(path)):
        assert again.is_fast("a", never) and not again.is_fast("b", never)


def test_a_small_gain_is_noise(clock):
    assert not Choices(None).is_fast("a", forms(clock, fast=0.00095))
    assert Choices(None).is_fast("a", forms(clock, fast=0.00095), 1.02)


@pytest.mark.parametrize("result", [RuntimeError("could not create a primitive"), 2 * ONE, torch.nan * ONE])
def test_a_form_that_fails_or_is_wrong_is_never_chosen(clock, result):
    assert not Choices(None).is_fast("a", forms(clock, fast=1e-6, result=result))


def test_trials_take_no_longer_than_they_may(tmp_path, clock):
    path = tmp_path / "forms.jsonl"
    choices = Choices(path)
    for number in range(200):
        choices.is_fast(str(number), forms(clock, plain=0.002, fast=0.001))
    assert clock[0] < kernels.SECONDS + kernels.SECONDS_EACH + 0.003
    assert choices.is_fast("0", never) and not choices.is_fast("199", never)
    assert not Choices(path).is_fast("199", never), "a later program must draw the same"


def test_the_first_of_two_programs_decides(tmp_path, clock):
    first, second = Choices(tmp_path / "a.jsonl"), Choices(tmp_path / "a.jsonl")
    assert first.is_fast("a", forms(clock, fast=0.0001))
    assert second.is_fast("a", forms(clock, fast=0.01))


@pytest.mark.parametrize(
    "content", [b"", b"\xff\xfe\x00", b"[" * 100_000, b'{"form": 1, "fast": true}', b'{"form": "a", "fast": "no"}']
)
def test_a_damaged_file_costs_only_time(tmp_path, clock, content):
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    assert Choices(path).is_fast("a", forms(clock, fast=0.0001))
    assert Choices(path).is_fast("a", never)


def test_where_nothing_can_be_written_the_choice_holds_in_memory(tmp_path, clock):
    (tmp_path / "file").write_text("")
    choices = Choices(tmp_path / "file" / "a.jsonl")
    assert choices.is_fast("a", forms(clock, fast=0.0001)) and choices.is_fast("a", never)


@pytest.mark.parametrize(("mode", "expected"), [("fast", True), ("torch", False)])
def test_the_environment_decides_without_a_trial(monkeypatch, mode, expected):
    monkeypatch.setenv(kernels.VARIABLE, mode)
    monkeypatch.setattr(kernels, "_used", {})
    assert kernels.forms_in_use() == ""
    assert kernels.takes_fast_form("a", never) is expected
    assert (kernels.forms_in_use() == "torch") is not expected
    monkeypatch.setenv(kernels.VARIABLE, "quick")
    with pytest.raises(UsageError, match="measured, torch or fast, found 'quick'"):
        kernels.takes_fast_form("a", never)


def test_measured_choices_are_kept_by_machine(tmp_path, monkeypatch, clock):
    monkeypatch.setenv(kernels.VARIABLE, "measured")
    monkeypatch.setenv("LATENTDIFF_CACHE", str(tmp_path))
    monkeypatch.setattr(kernels, "_of_machine", {})
    assert kernels.takes_fast_form("a", forms(clock, fast=0.0001))
    (file,) = (tmp_path / "forms").iterdir()
    assert json.loads(file.read_text())["form"] == "a"
    assert torch.__version__.split("+")[0].replace(".", "-") in file.name
    kernels.machine.cache_clear()
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "SSE41")
    assert kernels.machine(torch.get_num_threads()) != file.stem != kernels.machine(64)
    kernels.machine.cache_clear()


@pytest.mark.parametrize("then", ["none", "gelu", "sigmoid"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_there", [True, False])
def test_the_product_is_the_same_without_torchs_private_name(monkeypatch, is_there, dtype, then):
    if not is_there:
        monkeypatch.setattr(kernels, "_operation", lambda: None)
    kernels.has_product.cache_clear()
    try:
        assert is_there or not kernels.has_product(dtype)
        x, weight, bias = (torch.randn(shape).to(dtype) for shape in ((20, 24), (8, 24), (8,)))
        expected = kernels._THEN[then](F.linear(x.double(), weight.double(), bias.double()))
        out = kernels.product(x, weight, bias, then)
        assert out.dtype == dtype
        torch.testing.assert_close(out.double(), expected, rtol=2e-2, atol=2e-2)
    finally:
        kernels.has_product.cache_clear()


def test_a_format_that_onednn_refuses_is_not_asked_for(monkeypatch):
    def refuse(*_):
        raise RuntimeError("could not create a primitive descriptor for the inner product forward propagation")

    monkeypatch.setattr(kernels, "_operation", lambda: refuse)
    kernels.has_product.cache_clear()
    try:
        assert not kernels.has_product(torch.bfloat16)
        torch.testing.assert_close(kernels.product(ONE[None], ONE[None]), 4 * ONE[:1, None])
    finally:
        kernels.has_product.cache_clear()
