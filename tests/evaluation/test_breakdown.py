"""Kinds of failures, counted by hand."""

from __future__ import annotations

from PIL import Image

from latentdiff.evaluation.breakdown import failure_table, groups_of, image_path, save_examples
from latentdiff.evaluation.protocol import Outcome, Result
from latentdiff.image import save_png


def outcome(task, number, index, kind):
    return Outcome(number, task, "a prompt", (kind,) if kind else (), True, index, kind)


RESULT = Result.of(
    [
        outcome("counting", 7, 0, None),
        outcome("counting", 7, 1, "wrong count"),
        outcome("counting", 8, 0, "not clear"),
        outcome("counting", 8, 1, "wrong count"),
        outcome("colors", 9, 0, "wrong colour"),
        outcome("two_object", 2, 0, None),
    ]
)


def test_groups_by_hand():
    assert [group.to_json() for group in groups_of(RESULT)] == [
        {"task": "counting", "kind": "not clear", "images": 1, "share": 0.25, "example": "00008/samples/0000.png"},
        {"task": "counting", "kind": "wrong count", "images": 2, "share": 0.5, "example": "00007/samples/0001.png"},
        {"task": "colors", "kind": "wrong colour", "images": 1, "share": 1.0, "example": "00009/samples/0000.png"},
    ]


def test_table():
    header, two, counting, colours = failure_table(RESULT).splitlines()
    assert header.split()[3:] == "missing wrong thing not clear wrong count wrong colour wrong relation".split()
    assert two.split() == ["two", "objects", *"------"]
    assert counting.split() == ["counting", "-", "-", "0.250", "0.500", "-", "-"]
    assert colours.split() == ["colours", "-", "-", "-", "-", "1.000", "-"]


def test_an_image_of_each_kind(tmp_path):
    colours = {(8, 0): "red", (7, 1): "lime", (9, 0): "blue"}
    for (number, index), colour in colours.items():
        path = image_path(tmp_path, number, index)
        path.parent.mkdir(parents=True)
        save_png(Image.new("RGB", (16, 16), colour), path)
    save_examples(tmp_path, groups_of(RESULT))
    with Image.open(tmp_path / "failures.png") as sheet:
        middle = [sheet.getpixel((sheet.width * (2 * place + 1) // 6, 128)) for place in range(3)]
    assert middle == [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    save_examples(tmp_path, [])
    assert not (tmp_path / "failures.png").exists()
