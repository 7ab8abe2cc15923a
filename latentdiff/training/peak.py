"""The most memory that this process has used, over stretches of its life that are told apart."""

from __future__ import annotations

import contextlib
from pathlib import Path

import torch

from latentdiff.training.journal import peak_memory

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_PEAK_AGAIN = "5"  # makes the peak what is used now; see proc_pid_clear_refs(5)


class PeakMemory:
    """Peaks as the kernel reports them, or torch for a GPU.

    Where the system does not let a peak be forgotten (others than Linux), a stretch has that of all before it too.

    Args:
        device: where the computation runs.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._before = 0
        self.begin()

    def begin(self) -> None:
        """Begin a new stretch."""
        self._before = self.overall
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            with contextlib.suppress(OSError):
                _RESET.write_text(_PEAK_AGAIN)

    @property
    def stretch(self) -> int:
        """Bytes at the most since `begin`."""
        return (_of_kernel("VmHWM") if self._device.type != "cuda" else None) or peak_memory(self._device)

    @property
    def overall(self) -> int:
        """Bytes at the most since this was made."""
        return max(self._before, self.stretch)


def used_memory(device: torch.device) -> int:
    """Bytes that this process uses now; its peak so far where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return _of_kernel("VmRSS") or peak_memory(device)


def _of_kernel(name: str) -> int | None:
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:")), None)
