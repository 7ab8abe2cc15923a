"""What is said when a prompt is not read as its author may think."""

from __future__ import annotations

import warnings

LONGEST = 60  # letters of a prompt that a message quotes


class PromptWarning(UserWarning):
    """Some of a prompt is dropped or read as letters; the message names what."""


def shortened(text: str, longest: int = LONGEST) -> str:
    """The text in quotes; of a long one the beginning and its length."""
    return repr(text) if len(text) <= longest else f"{text[:longest]!r}... ({len(text)} letters)"


def warn(message: str) -> None:
    """Say it as a `PromptWarning`."""
    warnings.warn(message, PromptWarning, stacklevel=3)
