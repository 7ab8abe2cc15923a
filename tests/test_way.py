"""The way of a prompt stays short enough to be read: how many files of ours an image passes."""

from __future__ import annotations

import sys
from pathlib import Path
from types import FrameType

import latentdiff
from tests import peers

PACKAGE = str(Path(latentdiff.__file__).parent)
MOST = 37


def test_an_image_enters_few_files():
    pipe = peers.ours("sd1")
    entered: set[str] = set()

    def enter(frame: FrameType, event: str, argument: object) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(PACKAGE):
            entered.add(frame.f_code.co_filename.removeprefix(PACKAGE))

    pipe("a")  # what is imported or chosen at the first image does not count
    sys.setprofile(enter)
    try:
        pipe("a")
    finally:
        sys.setprofile(None)
    assert 10 < len(entered) <= MOST, " ".join(sorted(entered))
