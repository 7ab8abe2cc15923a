"""Errors that a user can cause or cure.

Every message is one line that says what was expected, what was found and what to do. The command line prints it without
a traceback and leaves with `exit_code`.
"""

from __future__ import annotations


class LatentDiffError(Exception):
    """Base of all errors that latentdiff raises on purpose."""

    exit_code = 1


class UsageError(LatentDiffError):
    """An argument is outside its domain: an unknown sampler, zero steps, a size that is no multiple of 8."""

    exit_code = 2


class ConfigError(LatentDiffError):
    """A configuration has an unknown key, a value outside its domain, or describes an unsupported architecture."""


class CheckpointError(LatentDiffError):
    """A model file is damaged, foreign, or does not fit the architecture that it is loaded into."""


class DataError(LatentDiffError):
    """A data set cannot be used: nothing found, captions missing, pictures unreadable."""


class NotFiniteError(LatentDiffError):
    """A computation gave NaN or infinity; the message names the part and the step."""


class MissingDependencyError(LatentDiffError):
    """An optional package or a system font is needed and not installed; the message says how to install it."""
