"""The way of a prompt stays short enough to be read: how many files of ours an image passes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import pytest

import latentdiff
from latentdiff import Pipeline

PACKAGE = str(Path(latentdiff.__file__).parent)
MOST = 30  # with the forms of torch; where ours compute attention, their file is one more


@pytest.fixture(scope="module")
def pipe() -> Iterator[Pipeline]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LATENTDIFF_FORMS", "torch")
        made = Pipeline.load(device="cpu")
        made("a", steps=1)  # what is imported or chosen at the first image does not count
        yield made


def entered(call: Callable[[], object]) -> set[str]:
    """The files of ours with a function that is called on the way."""
    found: set[str] = set()

    def enter(frame: FrameType, event: str, argument: object) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(PACKAGE):
            found.add(frame.f_code.co_filename.removeprefix(PACKAGE))

    sys.setprofile(enter)
    try:
        call()
    finally:
        sys.setprofile(None)
    return found


def test_an_image_enters_few_files(pipe):
    found = entered(lambda: pipe("a"))
    assert {"/pipeline.py", "/diffusion/denoise.py", "/networks/unet.py", "/recipe.py"} <= found
    assert len(found) <= MOST, " ".join(sorted(found))


def test_what_is_asked_for_is_entered_besides(pipe):
    found = entered(lambda: pipe("(a:1.2)", steps=1, freeu=(1.1, 1.1, 0.9, 0.9)))
    assert {"/prompts/weights.py", "/networks/freeu.py", "/request/domains.py"} <= found
