"""Attention by oneDNN's products, in chunks, against the equation in float64."""

from __future__ import annotations

import pytest
import torch

from latentdiff.networks import attention as backends
from latentdiff.networks.attention import attention, chunked, plain, use_attention_backend
from latentdiff.networks.kernels import has_product

pytestmark = pytest.mark.skipif(not has_product(torch.float32), reason="torch without oneDNN's products")

in_bfloat16 = pytest.mark.skipif(not has_product(torch.bfloat16), reason="a processor without bfloat16")
DTYPES = [torch.float32, pytest.param(torch.bfloat16, marks=in_bfloat16)]
TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 1e-2}  # relative to the largest entry


def tensors(queries: int, keys: int, size: int, *, spread: float = 1.0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 3, queries, size), (2, 3, keys, size), (2, 3, keys, size)]
    return [spread * torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("queries", "keys", "size"), [(130, 130, 40), (200, 77, 8), (37, 1, 16), (1, 300, 5)])
def test_equals_the_equation(dtype: torch.dtype, queries: int, keys: int, size: int, monkeypatch) -> None:
    monkeypatch.setattr(chunked, "MAX_SCORES", 50 * keys)  # several chunks, the last one shorter
    q, k, v = (x.to(dtype) for x in tensors(queries, keys, size))
    expected = plain.plain_attention(q.double(), k.double(), v.double())
    out = chunked.chunked_attention(q, k, v)
    assert out.dtype == dtype and out.shape == q.shape
    error = (out.double() - expected).abs().max() / expected.abs().max()
    assert error < TOLERANCES[dtype]


def test_scores_of_thousands_do_not_overflow() -> None:
    q, k, v = (x.float() for x in tensors(40, 40, 16, spread=30.0))
    expected = plain.plain_attention(q.double(), k.double(), v.double())
    torch.testing.assert_close(chunked.chunked_attention(q, k, v).double(), expected, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_scores_are_as_exact_with_the_maximum_as_without(dtype: torch.dtype, monkeypatch) -> None:
    q, k, v = (x.to(dtype) for x in tensors(90, 110, 16))
    q = q * (40 / (q.norm(dim=3).max() * k.norm(dim=3).max()) * 4).item()  # scores up to 40
    expected = plain.plain_attention(q.double(), k.double(), v.double())
    for safe in (44.0, 0.0):
        monkeypatch.setattr(chunked, "SAFE_SCORE", safe)
        error = (chunked.chunked_attention(q, k, v).double() - expected).abs().max() / expected.abs().max()
        assert error < 3 * TOLERANCES[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_beyond_the_range_of_exp_take_the_maximum(dtype: torch.dtype) -> None:
    q, k, v = (x.to(dtype) for x in tensors(90, 110, 16))
    q = q * (200 / (q.norm(dim=3).max() * k.norm(dim=3).max()) * 4).item()  # e^200 is no float32
    expected = plain.plain_attention(q.double(), k.double(), v.double())
    out = chunked.chunked_attention(q, k, v).double()
    assert torch.isfinite(out).all()
    assert (out - expected).abs().max() / expected.abs().max() < 20 * TOLERANCES[dtype]


@in_bfloat16
def test_bfloat16_takes_no_pass_over_the_scores_whatever_the_keys_have_in_common(monkeypatch) -> None:
    q, k, v = (x.bfloat16() for x in tensors(90, 110, 16))
    k = k + 64.0
    expected = plain.plain_attention(q.double(), k.double(), v.double())
    monkeypatch.delattr(chunked, "_powers_of_two")
    error = (chunked.chunked_attention(q, k, v).double() - expected).abs().max() / expected.abs().max()
    assert error < TOLERANCES[torch.bfloat16]


@in_bfloat16
def test_a_query_far_from_all_keys_keeps_its_weights() -> None:
    q, k, v = (x.bfloat16() for x in tensors(30, 40, 16))
    q[:, :, 1:] *= 1e-3
    q[:, :, 0] *= 40 / (q[:, :, 0].norm(dim=2) * k.norm(dim=3).amax(2) / 4).amax().item()
    expected = plain.plain_attention(q.double(), k.double(), v.double())
    error = (chunked.chunked_attention(q, k, v).double() - expected).abs().max() / expected.abs().max()
    assert error < 3 * TOLERANCES[torch.bfloat16]


def test_heads_behind_tokens_need_no_copy_by_the_caller() -> None:
    q, k, v = (x.float() for x in tensors(50, 60, 8))
    expected = chunked.chunked_attention(q, k, v)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    assert torch.equal(chunked.chunked_attention(*strided), expected)


def test_auto_takes_it_for_large_maps_in_inference_only(monkeypatch) -> None:
    taken = []
    monkeypatch.setattr(backends, "chunked_attention", lambda q, k, v: taken.append(q.dtype) or q)
    large = [x.float() for x in tensors(200, 200, 8)]
    with use_attention_backend("auto"), torch.no_grad():
        attention(*large)
        assert taken == [torch.float32]
        attention(*(x.double() for x in large))
        attention(*(x[:, :, :20] for x in large))
        with torch.enable_grad():
            attention(*large)
        assert len(taken) == 1
