"""Two models compared: differences in closed form."""

from __future__ import annotations

import pytest

from latentdiff.evaluation.comparison import Compared
from latentdiff.evaluation.protocol import Outcome, Result
from latentdiff.evaluation.report import Scores

SETTINGS = {"seeds_per_prompt": 2}


def scores(name, right):
    """Two images of each prompt; `right` says of each prompt of counting and of colours how many are right."""
    outcomes = [
        Outcome(10 * place + number, task, "", () if image < count else ("wrong",), True, image)
        for place, (task, counts) in enumerate(right.items())
        for number, count in enumerate(counts)
        for image in range(2)
    ]
    return Scores(name, name * 8, SETTINGS, Result.of(outcomes))


def test_differences_by_hand():
    report = scores("new", {"counting": (2, 1), "colors": (2, 2)})
    found = Compared(report, scores("old", {"counting": (1, 0), "colors": (2, 0)})).differences()
    assert {task: one.value for task, one in found.items()} == {"counting": 0.5, "colors": 0.5, "mean": 0.5}
    # Each prompt of counting gained the same, so that no choice of prompts gives another difference; of colours, one did.
    assert (found["counting"].low, found["counting"].high) == (0.5, 0.5)
    assert (found["colors"].low, found["colors"].high) == (0.0, 1.0)


def test_the_order_counts():
    new, old = scores("new", {"counting": (2, 1)}), scores("old", {"counting": (0, 1)})
    there, back = Compared(new, old).differences()["mean"], Compared(old, new).differences()["mean"]
    assert there.value == -back.value == 0.5
    assert (there.low, there.high) == pytest.approx((-back.high, -back.low))


def test_report():
    compared = Compared(scores("new", {"counting": (2,)}), scores("old", {"counting": (0,)}))
    assert "new less old" in str(compared) and "+1.000 [+1.000, +1.000]" in str(compared)
    values = compared.to_json()
    assert values["model"] == "new" and values["compared"]["model"] == "old"
    assert values["compared"]["differences"]["mean"]["value"] == 1.0
