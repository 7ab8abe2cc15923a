"""The attention back ends on a CUDA device, against the plain one in float64 on the CPU."""

from __future__ import annotations

import pytest
import torch

from latentdiff.networks.attention import attention, use_attention_backend

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

# (heads, queries, keys, head size): self-attention and text of SD 1.x (40 to 160), SD 2.x (64), the VAE (512).
SHAPES = [(8, 1024, 1024, 40), (8, 1024, 77, 40), (8, 64, 77, 160), (5, 1024, 1024, 64), (1, 1024, 1024, 512)]
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def xformers_has_kernels() -> bool:
    """xFormers imports without its CUDA extension when torch is of another version; then it has nothing to run."""
    try:
        from xformers.ops import memory_efficient_attention
    except ImportError:
        return False
    probe = torch.zeros(1, 8, 1, 8, device="cuda", dtype=torch.float16)
    try:
        memory_efficient_attention(probe, probe, probe)
    except NotImplementedError:
        return False
    return True


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("backend", ["auto", "sdpa", "sliced", "plain", "xformers"])
def test_backends_agree(
    backend: str, dtype: torch.dtype, shape: tuple[int, int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    if backend == "xformers" and not xformers_has_kernels():
        pytest.skip("xformers is not installed or was built for another torch")
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    heads, queries, keys, size = shape
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, n, size, generator=generator).to(dtype) for n in (queries, keys, keys))
    with use_attention_backend("plain"):
        expected = attention(q.double(), k.double(), v.double())
    with torch.no_grad(), use_attention_backend(backend):  # `auto` tries kernels only without gradients
        found = attention(q.cuda(), k.cuda(), v.cuda())
    assert found.dtype == dtype and found.device.type == "cuda"
    torch.testing.assert_close(found.cpu().double(), expected, rtol=0, atol=TOLERANCE[dtype])
