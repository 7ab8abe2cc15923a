"""Attention back ends against the plain one."""

from __future__ import annotations

import pytest
import torch

from latentdiff.errors import UsageError
from latentdiff.networks.attention import ATTENTION_BACKENDS, attention, sliced, use_attention_backend


def tensors(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 3, 50, 16, generator=generator, dtype=dtype)
    k, v = torch.randn(2, 2, 3, 11, 16, generator=generator, dtype=dtype)
    return q, k, v


@pytest.mark.parametrize("name", [name for name in ATTENTION_BACKENDS if name != "xformers"])
def test_back_ends_agree(name: str, monkeypatch) -> None:
    monkeypatch.setattr(sliced, "MAX_WEIGHTS", 2 * 3 * 11 * 7)  # seven queries at a time
    q, k, v = tensors(torch.float64)
    scores = torch.einsum("nhld,nhsd->nhls", q, k) / 4
    expected = torch.einsum("nhls,nhsd->nhld", torch.softmax(scores, -1), v)
    with use_attention_backend(name):
        torch.testing.assert_close(attention(q, k, v), expected)


def test_slices_stay_small(monkeypatch) -> None:
    seen = []
    plain = sliced.plain_attention
    monkeypatch.setattr(sliced, "MAX_WEIGHTS", 2 * 3 * 11 * 7)
    monkeypatch.setattr(sliced, "plain_attention", lambda q, k, v: seen.append(q.shape[2]) or plain(q, k, v))
    sliced.sliced_attention(*tensors())
    assert seen == [7] * 7 + [1]


def test_xformers_on_the_cpu_is_refused_clearly() -> None:
    with use_attention_backend("xformers"), pytest.raises(UsageError, match="CUDA.*--attention sdpa"):
        attention(*tensors())


def test_an_unknown_back_end_names_the_choices() -> None:
    with pytest.raises(UsageError, match="sdpa, xformers, sliced, plain"), use_attention_backend("flash9"):
        pass


def test_the_back_end_is_restored_after_an_error() -> None:
    with pytest.raises(RuntimeError), use_attention_backend("xformers"):
        raise RuntimeError
    attention(*tensors())
