"""Settings that every test runs under."""

from __future__ import annotations

import os

from hypothesis import settings

# No test opens a socket; the hub client reads this when it is imported.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# Shared machines are slow at random: a time limit per example would fail honest tests.
settings.register_profile("latentdiff", deadline=None)
settings.load_profile("latentdiff")
