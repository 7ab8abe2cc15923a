"""What the pages of the documentation say of names is true."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import get_args

import pytest

from latentdiff import Pipeline, image_to_image, inpaint
from latentdiff.request.calls import OTHERWISE, SAME
from latentdiff.request.options import OPTIONS, SamplerName, SpacingName
from tools import docs_hook

DOCS = Path(__file__).parents[1] / "docs"
PAGE = (DOCS / "diffusers.md").read_text(encoding="utf-8")
ROWS = [[cell.strip() for cell in line.strip("|").split("|")] for line in PAGE.splitlines() if line.startswith("|")]


def names(cell: str) -> list[str]:
    return re.findall(r"`(\w+)`", cell)


def test_every_name_that_is_taken_or_refused_is_in_the_table():
    rows = [row for row in ROWS if len(row) == 3]
    taken = {name: names(row[1])[0] for row in rows if row[2].startswith("taken") for name in names(row[0])}
    refused = {name for row in rows if row[2].startswith("refused") for name in names(row[0])}
    assert taken == SAME
    assert refused == set(OTHERWISE)


def test_names_of_ours_exist():
    calls = (Pipeline.__call__, Pipeline.load, Pipeline.load_lora, image_to_image, inpaint)
    known = {name for call in calls for name in inspect.signature(call).parameters}
    rows = [row for row in ROWS if len(row) == 3 and row[2].startswith(("taken", "refused", "the same"))]
    for row in rows:
        own = names(row[1]) or names(row[0])
        assert set(own) <= known, row
    for call in re.findall(r"pipe\.(\w+)", "".join(row[1] for row in ROWS)):
        assert hasattr(Pipeline, call)


@pytest.mark.parametrize(("name", "choices"), [("sampler", get_args(SamplerName)), ("spacing", get_args(SpacingName))])
def test_samplers_and_spacings_exist(name, choices):
    named = set(re.findall(rf'`{name}="([\w-]+)"`', PAGE))
    assert named <= set(choices)
    if name == "sampler":
        assert named == set(choices)


def test_the_page_of_options_has_a_row_for_each():
    assert docs_hook.MARK in (DOCS / "options.md").read_text(encoding="utf-8")
    rows = docs_hook.on_page_markdown(docs_hook.MARK).splitlines()
    assert [row.split("`")[1] for row in rows if row.startswith("| `")] == list(OPTIONS)
