from __future__ import annotations

from pathlib import Path

import pytest
import torch

from latentdiff.model.memory.estimate import available_memory, free_swap

CPU = torch.device("cpu")
GB = 10**9


def write(path: Path, text: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{text}\n")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A system with 8 GB available and no limit."""
    write(tmp_path / "proc/meminfo", f"MemTotal: 16000000 kB\nMemAvailable: {8 * GB // 1024} kB\nHugePages_Total: 0")
    return tmp_path


def group(folder: Path, limit: object, used: int, cache: int = 0) -> None:
    write(folder / "memory.max", limit)
    write(folder / "memory.current", used)
    write(folder / "memory.stat", f"anon 1\ninactive_file {cache}")


def test_what_the_kernel_says(root: Path):
    assert abs(available_memory(CPU, root) - 8 * GB) < 1024


def test_a_container_sees_its_limit(root: Path):
    write(root / "proc/self/cgroup", "0::/some/where")
    group(root / "sys/fs/cgroup/some/where", 3 * GB, 2 * GB, cache=GB // 2)
    group(root / "sys/fs/cgroup/some", "max", 5 * GB)
    assert available_memory(CPU, root) == 1.5 * GB


def test_limits_above_count_too(root: Path):
    write(root / "proc/self/cgroup", "0::/some/where")
    group(root / "sys/fs/cgroup/some/where", 4 * GB, GB)
    group(root / "sys/fs/cgroup/some", 4 * GB, 3 * GB)
    assert available_memory(CPU, root) == GB


def test_a_path_of_the_host_means_the_top(root: Path):
    write(root / "proc/self/cgroup", "0::/docker/123")
    group(root / "sys/fs/cgroup", 2 * GB, GB)
    assert available_memory(CPU, root) == GB


def test_the_first_version_of_control_groups(root: Path):
    write(root / "proc/self/cgroup", "8:pids:/\n4:cpu,memory:/job\n0::/")
    folder = root / "sys/fs/cgroup/memory/job"
    write(folder / "memory.limit_in_bytes", 2 * GB)
    write(folder / "memory.usage_in_bytes", GB)
    write(folder / "memory.stat", "total_inactive_file 0")
    assert available_memory(CPU, root) == GB
    write(folder / "memory.limit_in_bytes", 2**63 - 4096)  # its way of writing "no limit"
    assert available_memory(CPU, root) > 7 * GB


def test_swap_is_counted_apart(root: Path):
    assert free_swap(CPU, root) == 0
    write(root / "proc/meminfo", f"MemAvailable: 1 kB\nSwapFree: {GB // 1000} kB")
    assert free_swap(CPU, root) == GB // 1000 * 1024 and free_swap(torch.device("cuda"), root) == 0
    assert available_memory(CPU, root) == 1024


def test_a_system_that_does_not_say(tmp_path: Path):
    assert available_memory(CPU, tmp_path) is None


def test_this_machine_says_something_sensible():
    assert available_memory(CPU) is None or 0 <= available_memory(CPU) < 2**50
