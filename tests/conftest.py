"""Settings that every test runs under."""

from __future__ import annotations

import os
import signal

from hypothesis import settings

# No test opens a socket; the hub client reads this when it is imported.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# The fast forms of the CPU without trials, so that tests see them, and see the same ones everywhere.
os.environ.setdefault("LATENTDIFF_FORMS", "fast")

# Shared machines are slow at random: a time limit per example would fail honest tests.
settings.register_profile("latentdiff", deadline=None)
settings.load_profile("latentdiff")

# A command that a shell starts in the background ignores Ctrl-C, and so do its children; tests of Ctrl-C need the
# default.
signal.signal(signal.SIGINT, signal.default_int_handler)
