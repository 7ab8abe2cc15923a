"""How much memory this process may still take."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

_ROOT = Path("/")
_UNLIMITED = 2**60  # control groups write numbers of this size for "no limit"


def available_memory(device: torch.device, root: Path = _ROOT) -> int | None:
    """Bytes that can still be allocated on a device; None where the system does not say.

    On a CPU that is what the kernel counts as available, or less where a control group (a container) sets a limit.

    Args:
        root: where the files of the system lie, for tests.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type != "cpu":
        return None
    limits = [_meminfo(root).get("MemAvailable"), *_groups(root)]
    known = [limit for limit in limits if limit is not None]
    return max(0, min(known)) if known else None


def free_swap(device: torch.device, root: Path = _ROOT) -> int:
    """Bytes that the system can move from memory to a disk, slowly, to make room for what is on a device."""
    return _meminfo(root).get("SwapFree", 0) if device.type == "cpu" else 0


def trim() -> None:
    """Give memory that was freed, but that the C library still holds, back to the system."""
    if sys.platform == "linux":
        library = ctypes.CDLL(None)
        if hasattr(library, "malloc_trim"):  # glibc only
            library.malloc_trim(0)


def _meminfo(root: Path) -> dict[str, int]:
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
    except OSError:
        return {}
    return {
        name: 1024 * int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines) if rest.split()
    }


def _groups(root: Path) -> Iterator[int | None]:
    """What each control group above this process leaves of its limit; file pages that can be dropped do not count."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if number == "0":
            base, limit, usage, cache = "sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            base, limit, usage = "sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            cache = "total_inactive_file"
        else:
            continue
        top = root / base
        here = top / path.lstrip("/")
        # Inside a container the path may be that of the host; its own group is then mounted at the top.
        here = here if here.exists() else top
        for folder in (here, *(parent for parent in here.parents if parent == top or top in parent.parents)):
            yield _left(folder, limit, usage, cache)


def _left(folder: Path, limit: str, usage: str, cache: str) -> int | None:
    try:
        most = int((folder / limit).read_text())  # "max" is no number: no limit
        used = int((folder / usage).read_text())
        counts = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    return None if most >= _UNLIMITED else most - used + int(counts.get(cache, 0))
