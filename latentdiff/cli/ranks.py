"""One command in several processes: which of them this is, what is its share, and what they agree on.

A launcher (`accelerate launch`, `torchrun`, or any other) starts the same command several times and says in the
environment, as PyTorch's launchers do, RANK (this process), WORLD_SIZE (how many there are), LOCAL_RANK (which one of
this machine), and MASTER_ADDR and MASTER_PORT (where they find one another). Without those two they cannot talk: then
what they would have to agree on has to be given. Without WORLD_SIZE there is one process, and nothing here does
anything.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

from latentdiff.errors import LatentDiffError, UsageError

_PATIENCE = timedelta(days=30)  # how long a process waits for those that have more to do

Item = TypeVar("Item")


@dataclass(frozen=True)
class Ranks:
    """The processes of one command.

    Attributes:
        number: which one this is, from 0.
        count: how many there are.
        local: which one of this machine this is, from 0.
        can_talk: whether they know where to find one another.
    """

    number: int = 0
    count: int = 1
    local: int = 0
    can_talk: bool = False

    @classmethod
    def of_environment(cls) -> Ranks:
        """What the launcher says.

        Raises:
            UsageError: it says something that makes no sense.
        """
        count, number = _natural("WORLD_SIZE", 1), _natural("RANK", 0)
        if not number < count:
            raise UsageError(f"expected RANK in the environment to be below WORLD_SIZE, found {number} of {count}")
        can_talk = count > 1 and {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()
        return cls(number, count, _natural("LOCAL_RANK", number), can_talk)

    @property
    def is_first(self) -> bool:
        """Whether this process speaks for all."""
        return self.number == 0

    def own(self, items: Sequence[Item]) -> list[Item]:
        """The share of this process: every item is in the share of exactly one."""
        return list(items[self.number :: self.count])

    def device(self, name: str) -> str:
        """The device called `name`; for "auto" each process of a machine with GPUs gets one of its own."""
        if name != "auto" or self.count == 1:
            return name
        import torch

        return f"cuda:{self.local}" if torch.cuda.is_available() else name

    def agree(self, draw: Callable[[], Any]) -> Any:
        """What `draw` gives in the first process, which is the only one that calls it.

        Raises:
            LatentDiffError: another process has ended.
        """
        if not self.can_talk:
            return draw()
        value = [draw() if self.is_first else None]
        with _explained():
            _distributed().broadcast_object_list(value, src=0)
        return value[0]

    def worst(self, code: int) -> int:
        """The highest exit code of all processes, as soon as all are done; if they cannot talk, that of this one.

        Raises:
            LatentDiffError: another process has ended without saying so.
        """
        if not self.can_talk:
            return code
        codes: list[Any] = [None] * self.count
        with _explained():
            _distributed().all_gather_object(codes, code)
        return max(codes)


@contextmanager
def joined() -> Iterator[Ranks]:
    """The processes that the launcher has started, connected inside the `with` if they can talk."""
    ranks = Ranks.of_environment()
    if not ranks.can_talk:
        yield ranks
        return
    with _explained():
        _distributed().init_process_group("gloo", timeout=_PATIENCE)
    try:
        yield ranks
    finally:
        _distributed().destroy_process_group()


@contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except (RuntimeError, ValueError) as error:  # what torch.distributed raises
        raise LatentDiffError(
            "the connection to the other processes is lost: one of them has ended or cannot be reached; what it has not done "
            f"is made by the same command with --skip-existing ({' '.join(str(error).split())[:200]})"
        ) from error


def _distributed() -> Any:
    import torch.distributed

    return torch.distributed


def _natural(name: str, default: int) -> int:
    text = os.environ.get(name, "")
    if not text:
        return default
    if not text.isascii() or not text.isdigit() or (name == "WORLD_SIZE" and int(text) == 0):
        raise UsageError(f"expected a number as {name} in the environment, found {text!r}; unset it to run one process")
    return int(text)
