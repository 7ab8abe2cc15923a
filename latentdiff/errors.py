"""Errors that a user can cause or cure.

Every message is one line that says what was expected, what was found and what to do. The command line prints it without
a traceback and leaves with `exit_code`.
"""

from __future__ import annotations

# Characters that leave no ink and do no harm either: spaces of other widths, and what joins emoji into one.
_HARMLESS = frozenset("\u00a0\u2009\u200c\u200d\u202f\u3000")


def printable(text: object) -> str:
    """Text from anywhere as a terminal may show it: one line, in which control characters are written as escapes.

    A terminal obeys some of what it is sent (colours, titles, moving the cursor, right-to-left marks), and names and
    metadata in files may hold it.
    """
    line = str(text)
    if not line.isprintable():
        line = " ".join(line.splitlines()) if "\n" in line or "\r" in line else line
        line = "".join(c if c.isprintable() or c in _HARMLESS else ascii(c)[1:-1] for c in line)
    return line


class LatentDiffError(Exception):
    """Base of all errors that latentdiff raises on purpose; the message is `printable`."""

    exit_code = 1

    def __init__(self, message: object = "") -> None:
        super().__init__(printable(message))


class Stopped(LatentDiffError):
    """The user ended a computation and nothing is lost; the message says how to go on. Not a failure."""

    exit_code = 130


class UsageError(LatentDiffError):
    """An argument is outside its domain: an unknown sampler, zero steps, a size that is no multiple of 8."""

    exit_code = 2


class ConfigError(LatentDiffError):
    """A configuration has an unknown key, a value outside its domain, or describes an unsupported architecture."""


class CheckpointError(LatentDiffError):
    """A model file is damaged, foreign, or does not fit the architecture that it is loaded into."""


class DataError(LatentDiffError):
    """A data set cannot be used: nothing found, captions missing, images unreadable."""


class NotFiniteError(LatentDiffError):
    """A computation gave NaN or infinity; the message names the part and the step."""


class MissingDependencyError(LatentDiffError):
    """An optional package or program is needed and not installed; the message says how to install it."""
