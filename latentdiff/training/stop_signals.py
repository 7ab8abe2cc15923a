"""Ctrl-C and SIGTERM during training."""

from __future__ import annotations

import contextlib
import signal


class StopSignals:
    """Takes note of Ctrl-C and SIGTERM instead of dying; a second one is obeyed at once."""

    def __init__(self) -> None:
        self.received = False
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopSignals:
        # Handlers can be set from the main thread only; elsewhere the program around us deals with signals.
        with contextlib.suppress(ValueError):
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: object) -> None:
        self.received = True
        signal.signal(number, self._before[number])
