"""Patterns in a file are names with gaps, and fit what PEFT's regular expressions of that form fit."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from latentdiff.adapters.lora.peft import PEFTConfig
from latentdiff.errors import CheckpointError

CONFIG = PEFTConfig(Path("a.safetensors"))
PARTS = st.sampled_from(["a", "b", "ab", "to_q", "mid", "0"])


@given(
    path=st.lists(PARTS, min_size=1, max_size=5).map(".".join),
    parts=st.lists(PARTS, min_size=1, max_size=4),
    gaps=st.lists(st.sampled_from([".", ".*", ".*.", "."]), min_size=3, max_size=3),
)
def test_they_fit_what_peft_fits(path, parts, gaps):
    pattern = parts[0] + "".join(gap + part for gap, part in zip(gaps, parts[1:], strict=False))
    literal = re.escape(pattern).replace(r"\.\*", ".*")  # a dot is a dot; that of PEFT is any letter
    assert CONFIG._fits(pattern, path) == (re.match(rf"(.*\.)?({literal})$", path) is not None)


@pytest.mark.parametrize(
    "pattern", ["(", "(a+)+$", "a|b", "[ab]", "a*", "", ".*", "a" * 400, "a.*" * 20 + "b", "\x1b[31m"]
)
def test_other_expressions_are_refused(pattern):
    start = time.process_time()
    with pytest.raises(CheckpointError, match="a sensible pattern"):
        CONFIG._fits(pattern, "a." * 50)
    assert time.process_time() - start < 1


def test_the_ends_may_be_marked():
    assert CONFIG._fits("^a.b$", "a.b") and not CONFIG._fits("^b", "a.b") and CONFIG._fits(r"a\.b", "x.a.b")
