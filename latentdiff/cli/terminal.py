"""The terminal, pipe or nothing that the command line talks to, and the signals that end it.

Whatever becomes of the output, the work goes on: a reader that leaves (`| head`), streams that were closed before the
start, letters that the terminal does not know. Signals end the work where it stands, with one line and the exit code
that shells expect.
"""

from __future__ import annotations

import codecs
import errno
import io
import os
import signal
import sys
from types import FrameType
from typing import Any, TextIO

_GONE = (errno.EPIPE, errno.EIO, errno.ESHUTDOWN, errno.ECONNRESET)  # what writing to nobody gives
_ERRORS = "latentdiff.terminal"


class Terminated(BaseException):
    """A signal that ends the program arrived; not an Exception, so that nothing on the way takes it for a failure."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class Signals:
    """SIGINT, SIGTERM and SIGHUP as exceptions, where they would end the program; `received` is the last of them."""

    def __init__(self) -> None:
        self.received = 0
        self._process = os.getpid()

    def handle(self) -> None:
        """From now on; what a parent has asked to ignore (nohup) stays ignored."""
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)  # Windows has no SIGHUP
            if number and signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                signal.signal(number, self._raise)

    def release(self) -> None:
        """From now on they end the program at once and without a word."""
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)
            if number and signal.getsignal(number) == self._raise:
                signal.signal(number, signal.SIG_DFL)

    def _raise(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a worker that was forked
            os._exit(128 + number)
        self.received = number
        raise KeyboardInterrupt if number == signal.SIGINT else Terminated(number)


def open_streams() -> None:
    """Make standard output and error safe to write to."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # closed: the next file that is opened would get its number, and what is printed
            os.open(os.devnull, os.O_RDWR)
    codecs.register_error(_ERRORS, _escape)
    sys.stdout, sys.stderr = _stream(sys.stdout, 1), _stream(sys.stderr, 2)


def close_streams() -> int:
    """Write what is left; returns 1 if that cannot be done (a full disk), else 0."""
    code = 0
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            _to_nowhere(stream.fileno())
            code = 1
    return code


class _Tolerant(io.FileIO):
    """A stream whose reader may leave."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in _GONE:
                raise
            _to_nowhere(self.fileno())
            return len(data)


def _stream(stream: TextIO | None, number: int) -> TextIO:
    encoding = "utf-8" if stream is None else stream.encoding
    raw = io.BufferedWriter(_Tolerant(number, "w", closefd=False))
    is_eager = number == 2 or os.isatty(number)
    return io.TextIOWrapper(raw, encoding=encoding, errors=_ERRORS, line_buffering=is_eager, write_through=number == 2)


def _escape(error: UnicodeError) -> tuple[bytes, int]:
    """Letters that the encoding lacks as escapes; bytes of file names that were no text as they are."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    parts = (
        bytes([ord(letter) - 0xDC00]) if 0xDC80 <= ord(letter) <= 0xDCFF else letter.encode("ascii", "backslashreplace")
        for letter in text
    )
    return b"".join(parts), error.end


def _to_nowhere(number: int) -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, number)
    os.close(nowhere)
