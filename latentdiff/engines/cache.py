"""The folder where engines keep what took long to make."""

from __future__ import annotations

import os
import sys
from pathlib import Path

VARIABLE = "LATENTDIFF_CACHE"


def cache_folder(engine: str) -> Path:
    """The cache of one engine: in $LATENTDIFF_CACHE, or else where the system keeps a user's caches. It may be
    deleted."""
    given = os.environ.get(VARIABLE)
    return (Path(given) if given else _user_caches() / "latentdiff") / engine


def _user_caches() -> Path:
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
