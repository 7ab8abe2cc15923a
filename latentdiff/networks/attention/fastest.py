"""The fastest attention kernels for each size, found by trying them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as sdpa

from latentdiff.errors import MissingDependencyError
from latentdiff.networks.attention.plain import AttentionFunction
from latentdiff.networks.attention.xformers import xformers_attention

SECONDS = 0.02  # of trying, per candidate
MIN_GAIN = 0.05  # share of the time by which a candidate must beat PyTorch's own choice; less is noise of the clock
TOLERANCE = 0.02  # relative distance to PyTorch's own choice; bfloat16 kernels differ by some 0.005


def kernel_attention(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """PyTorch's attention by one of its kernels; RuntimeError where that one does not serve."""
    with sdpa_kernel(backend):
        return sdpa(q, k, v)


CUDA_CANDIDATES: dict[str, AttentionFunction] = {
    "flash": partial(kernel_attention, SDPBackend.FLASH_ATTENTION),
    "cudnn": partial(kernel_attention, SDPBackend.CUDNN_ATTENTION),
    "efficient": partial(kernel_attention, SDPBackend.EFFICIENT_ATTENTION),
    "xformers": xformers_attention,
}


class FastestAttention:
    """Attention by whichever candidate was fastest when a size first came by; PyTorch's own until one clearly beats
    it.

    A choice holds as long as the program runs, so all images of a program are made by the same kernels. A candidate
    that fails, is not installed or gives another result is left out. Nothing is tried while gradients are recorded,
    whose backward pass has other costs, or during the recording of a CUDA graph, which must not wait for the device.

    Args:
        candidates: functions `(q, k, v) -> out`, by name.
    """

    def __init__(self, candidates: Mapping[str, AttentionFunction]) -> None:
        self._candidates = candidates
        self._choices: dict[tuple[object, ...], AttentionFunction] = {}

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        key = (q.device, q.dtype, q.shape, k.shape)
        if key not in self._choices:
            if torch.is_grad_enabled() or (q.is_cuda and torch.cuda.is_current_stream_capturing()):
                return sdpa(q, k, v)
            self._choices[key] = self._fastest(q, k, v)
        return self._choices[key](q, k, v)

    def _fastest(self, q: Tensor, k: Tensor, v: Tensor) -> AttentionFunction:
        expected = sdpa(q, k, v)
        best, least = sdpa, seconds(sdpa, q, k, v) * (1 - MIN_GAIN)
        for function in self._candidates.values():
            try:
                distance = (function(q, k, v) - expected).norm()
                if not distance <= TOLERANCE * expected.norm():  # also false for NaN
                    continue
                needed = seconds(function, q, k, v)
            except (RuntimeError, NotImplementedError, ValueError, MissingDependencyError):
                continue  # this kernel does not serve device, dtype or head size
            if needed < least:
                best, least = function, needed
        return best


def seconds(function: AttentionFunction, q: Tensor, k: Tensor, v: Tensor) -> float:
    """The median time of a call, the device's work included."""
    from torch.utils.benchmark import Timer  # slow to import, and not needed on a CPU

    timer = Timer("function(q, k, v)", globals={"function": function, "q": q, "k": k, "v": v})
    return timer.blocked_autorange(min_run_time=SECONDS).median


cuda_attention = FastestAttention(CUDA_CANDIDATES)
