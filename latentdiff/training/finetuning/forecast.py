"""What a fine-tuning will take, known beforehand: steps, time, memory and disk on this machine.

Nothing is guessed that can be measured. The run is prepared as it is, in a folder that is thrown away, with the caches
of a few images; a few steps of the true configuration are taken, everything that happens between steps happens once, and
what was measured is multiplied out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from latentdiff.training.report.words import duration

_GIB = 2**30
_WHOLE_FREE = 0.95  # of what is free; the rest is for what nobody counts


@dataclass(frozen=True)
class Forecast:
    """What a run takes.

    Attributes:
        steps: those that are left to do.
        passes: how often each image is seen in them, on average.
        seconds: by what; empty where the run does not fit into memory, and was not tried.
        memory: bytes at the most, by what.
        free_memory: bytes that the run may take; None where the system does not say.
        disk: bytes at the end, by what.
        free_disk: bytes where the run's folder will lie.
        passing_disk: bytes of a checkpoint, which has room beside the older ones while it is written.
        remedies: changes of the settings with which the run would fit into memory.
    """

    steps: int
    passes: float
    seconds: Mapping[str, float]
    memory: Mapping[str, int]
    free_memory: int | None
    disk: Mapping[str, int]
    free_disk: int
    passing_disk: int = 0
    remedies: tuple[str, ...] = ()

    @property
    def fits_memory(self) -> bool:
        return self.free_memory is None or sum(self.memory.values()) <= _WHOLE_FREE * self.free_memory

    @property
    def fits_disk(self) -> bool:
        return sum(self.disk.values()) + self.passing_disk <= _WHOLE_FREE * self.free_disk

    @property
    def fits(self) -> bool:
        """Whether memory and disk suffice."""
        return self.fits_memory and self.fits_disk

    def lines(self) -> Iterator[str]:
        """The forecast for people."""
        yield f"steps: {self.steps}, in which each image is seen {self.passes:.3g} times"
        if self.seconds:
            yield f"time: {duration(sum(self.seconds.values()))}: {_by(self.seconds, duration)}"
        free = "" if self.free_memory is None else f" of {_size(self.free_memory)} free"
        yield f"memory: {_size(sum(self.memory.values()))} at most{free}: {_by(self.memory, _size)}"
        yield f"disk: {_size(sum(self.disk.values()))} of {_size(self.free_disk)} free: {_by(self.disk, _size)}"
        if not self.fits_memory:
            yield f"the memory does not suffice; {self._what_helps()}"
        if not self.fits_disk:
            yield (
                f"the disk does not suffice: {_size(sum(self.disk.values()) + self.passing_disk)} are needed while a"
                " checkpoint is written; free some space, take --keep-checkpoints 1, or choose another --out"
            )
        if self.fits:
            yield "it fits"

    def _what_helps(self) -> str:
        if self.remedies:
            return f"it would with one of these: {'; '.join(self.remedies)}"
        return "no setting alone would change that: take a smaller model or a machine with more memory"


def remedies(
    fixed: int, per_row: int, rows: int, accumulation: int, free: int, others: Mapping[str, tuple[int, int]]
) -> tuple[str, ...]:
    """Flags with which a run would fit into memory.

    Args:
        fixed, per_row: bytes at the most that do not depend on the size of a micro-batch, and those that each of its rows
            takes.
        rows: of a micro-batch.
        accumulation: micro-batches of a batch.
        free: bytes that the run may take.
        others: by flag, `fixed` and `per_row` with it.
    """
    found = []
    for flag, (base, each) in {"": (fixed, per_row), **others}.items():
        sizes = (size for size in range(rows, 0, -1) if rows % size == 0)
        fitting = next((size for size in sizes if base + size * each <= _WHOLE_FREE * free), None)
        if fitting is None or (not flag and fitting == rows):
            continue
        more = f"--accumulation {accumulation * rows // fitting}" if fitting < rows else ""
        found.append(" ".join(filter(None, (flag, more))))
    return tuple(found)


def times_due(every: int, first: int, last: int) -> int:
    """How often something happens after step `first`, up to `last`, that happens every so many steps and at the last."""
    return last // every - first // every + (last % every != 0) if last > first else 0


def _size(count: float) -> str:
    return f"{count / _GIB:.2f} GiB" if count >= _GIB / 10 else f"{count / 2**20:.1f} MiB"


def _by(parts: Mapping[str, float], say: object) -> str:
    assert callable(say)
    return ", ".join(f"{name} {say(value)}" for name, value in parts.items() if value)
