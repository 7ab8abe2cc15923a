from __future__ import annotations

import base64
import sys
from xml.etree import ElementTree

import pytest

from latentdiff.training.report.charts import line_chart, number, smoothed

SVG = "{http://www.w3.org/2000/svg}"


def drawing(*arguments, **options):
    source = line_chart(*arguments, **options)
    assert source.startswith("data:image/svg+xml;base64,")
    return ElementTree.fromstring(base64.b64decode(source.split(",")[1]))


def texts(chart):
    return ["".join(text.itertext()).strip() for text in chart.iter(f"{SVG}text")]


def test_a_chart_names_what_it_shows():
    pytest.importorskip("matplotlib")
    chart = drawing("Loss & <more>", {"a": [(0, 1.0), (10, 3.0)], "b": [(5, 2.0)]}, mark=(5, "best"))
    assert {"Loss & <more>", "a", "b", "best", "step"} <= set(texts(chart))
    assert line_chart("x", {"a": [(0, 1.0)]}) == line_chart("x", {"a": [(0, 1.0)]})
    assert "matplotlib.pyplot" not in sys.modules  # which would look for a screen


def test_a_logarithmic_chart_marks_powers_of_ten():
    pytest.importorskip("matplotlib")
    chart = drawing("x", {"a": [(0, 0.01), (1, 10.0)]}, logarithmic=True)
    assert {"10−2", "10−1", "100", "101"} <= {"".join(text.split()) for text in texts(chart)}


def test_charts_survive_constants_and_infinities():
    pytest.importorskip("matplotlib")
    assert line_chart("nothing", {"a": [], "b": [(1, float("nan"))]}) == ""
    drawing("one", {"a": [(1, 0.0)]}, logarithmic=True)
    drawing("two", {"a": [(1, 2.0), (2, float("inf")), (3, 2.0)]})


def test_smoothing_is_a_mean_with_a_half_life():
    assert smoothed([(0, 1.0), (10, 1.0)], 5) == [(0, 1.0), (10, 1.0)]
    assert smoothed([(0, 0.0), (5, 1.0)], 5)[-1][1] == pytest.approx(1 / 1.5)


def test_numbers_are_short():
    assert [number(value) for value in (0.12345, 1.2345e-5, 123456, 0, 2.5)] == [
        "0.1235",
        "1.23e-05",
        "123456",
        "0",
        "2.5",
    ]
