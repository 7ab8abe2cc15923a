"""The folder of a run: one process at a time works in it, and finds it clean."""

from __future__ import annotations

import contextlib
import errno
import os
import platform
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from latentdiff.errors import DataError, UsageError
from latentdiff.training.checkpoint import check_space

LOCK = ".lock"

_TAKEN = (errno.EACCES, errno.EAGAIN, errno.EWOULDBLOCK, errno.EDEADLK)
_TEMPORARY = re.compile(r"\..+-[a-z0-9_]{8}(\.\w+)?")  # what `files.atomic_path` makes
_CACHE = "cache"
_OLD = 3600  # seconds after which a temporary file in a cache, which runs may share, is nobody's


@contextlib.contextmanager
def owned(folder: Path, *, main: bool = True) -> Iterator[None]:
    """Inside, the folder is this process's; what killed programs left half-written in it is gone.

    The system gives the lock back when its holder ends, however that happens, so none is ever stale.

    Args:
        main: of several processes of a run, only the main one takes the lock.

    Raises:
        UsageError: another process works in the folder; the message says which.
        DataError: the folder cannot be written to.
    """
    if not main:
        yield
        return
    prepare(folder)
    with open(folder / LOCK, "a+", encoding="utf-8") as file:
        if not _lock(file):
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise UsageError(f"{folder} is in use by {holder}; wait until it has ended, or choose another folder")
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
        file.flush()
        clean(folder)
        try:
            yield
        finally:
            file.truncate(0)  # the file stays: whoever removes it could take it from under the next one


def prepare(folder: Path, needed: int = 0) -> None:
    """Make a folder to write `needed` bytes to.

    Raises:
        DataError: it cannot be written to, or the disk is too full.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(None, "Permission denied")
    except OSError as error:
        raise DataError(
            f"cannot write to the run folder {folder}: {error.strerror}; choose another with --out"
        ) from error
    check_space(folder, needed)


def clean(folder: Path) -> None:
    """Remove what programs that were killed left half-written in a run folder."""
    for path in folder.rglob(".*"):
        if path.is_dir():
            if path.name.startswith(".writing-"):  # a checkpoint
                shutil.rmtree(path, ignore_errors=True)
        elif _TEMPORARY.fullmatch(path.name):
            shared = _CACHE in path.relative_to(folder).parts
            with contextlib.suppress(OSError):
                if not shared or time.time() - path.stat().st_mtime > _OLD:
                    path.unlink()


def _lock(file: IO[str]) -> bool:
    """Take the lock if nobody has it."""
    try:
        try:
            import fcntl
        except ImportError:  # Windows, which locks bytes: one that is never written
            import msvcrt

            file.seek(1 << 30)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        # A file system that cannot lock (some of those over networks) does not keep anyone from training.
        return error.errno not in _TAKEN
    return True


def hint_file(sample: Path) -> Path:
    """Where the hint lies that a sample image followed, of a ControlNet that is trained."""
    return sample.with_name(f"{sample.stem}-hint.png")
