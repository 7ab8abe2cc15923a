"""What the pages of the documentation say of names is true."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

from latentdiff import Pipeline, image_to_image, inpaint
from latentdiff.diffusion.drawing import CLASSES, SPACING_FLAGS
from latentdiff.request.calls import OTHERWISE, SAME
from latentdiff.request.options import OPTIONS
from latentdiff.tasks import refine
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
    calls = (Pipeline.__call__, Pipeline.load, Pipeline.load_lora, image_to_image, inpaint, refine)
    known = {name for call in calls for name in inspect.signature(call).parameters}
    rows = [row for row in ROWS if len(row) == 3 and row[2].startswith(("taken", "refused", "the same"))]
    for row in rows:
        own = names(row[1]) or names(row[0])
        assert set(own) <= known, row
    for call in re.findall(r"pipe\.(\w+)", "".join(row[1] for row in ROWS)):
        assert hasattr(Pipeline, call)


def test_schedulers_and_their_flags_are_those_that_folders_are_read_by():
    classes = dict(re.findall(r'`(\w+Scheduler)` \| `sampler="([\w-]+)"`', PAGE))
    assert classes == {name: own for name, own in CLASSES.items() if "Parallel" not in name}
    assert dict(re.findall(r'`(use_\w+)=True` \| `spacing="([\w-]+)"`', PAGE)) == SPACING_FLAGS


def test_the_page_of_options_has_a_row_for_each():
    assert docs_hook.MARK in (DOCS / "options.md").read_text(encoding="utf-8")
    rows = docs_hook.on_page_markdown(docs_hook.MARK).splitlines()
    assert sorted(row.split("`")[1] for row in rows if row.startswith("| `")) == sorted(OPTIONS)
    headings = [row.removeprefix("## ") for row in rows if row.startswith("## ")]
    assert set(headings) == {option.heading or docs_hook.MOST_USED for option in OPTIONS.values()}
    assert headings[0] == docs_hook.MOST_USED and len(headings) == len(set(headings))
