"""What is said of a run, from logs made up for it."""

import json
import re
from importlib.resources import files

import pytest

from latentdiff.training.report.memorization import CopyCheck, Nearest
from latentdiff.training.report.words import copies_in_words, learned_in_words, use_of_result


@pytest.mark.parametrize(
    ("losses", "said"),
    [
        ([], "nothing was held out"),
        ([1.0, 0.8, 0.6], "fell by 40.0 %, and still fell at the end: more steps may help"),
        ([1.0, 0.75, 0.9], "fell by 25.0 % until step 10, and rose after it, as when images are learned by heart"),
        ([1.0, 0.75, 0.753], "fell by 25.0 % until step 10, and hardly changed after it"),
        ([1.0, 1.2, 1.3], "did not fall"),
        ([1.0, 0.999, 1.3], "did not fall"),
        ([1.0, float("nan"), 0.5], "fell by 50.0 %, and still fell"),
    ],
)
def test_what_was_learned(tmp_path, losses, said):
    lines = [json.dumps({"step": 10 * place, "val_mse": loss}) for place, loss in enumerate(losses)]
    (tmp_path / "log.jsonl").write_text("".join(f"{line}\n" for line in [*lines, json.dumps({"step": 20, "loss": 1.0})]))
    assert said in learned_in_words(tmp_path)


@pytest.mark.parametrize(
    ("near", "said"),
    [([False, False], "none of 2 samples is suspiciously"), ([True, False, True], "2 of 3 samples are suspiciously")],
)
def test_copies_are_counted(tmp_path, monkeypatch, near, said):
    assert copies_in_words(tmp_path) == "" == use_of_result(tmp_path)
    nearest = tuple(Nearest("00.png", "a.png", "t.png", 0.5, False, one) for one in near)
    check = CopyCheck(nearest, usual=1.0, threshold=0.5, compared=9, training_images=9)
    monkeypatch.setattr("latentdiff.training.report.words.read_copy_check", lambda run: check)
    assert copies_in_words(tmp_path).startswith(said)


def test_images_side_by_side_keep_their_proportions():
    """In a row that stretches its items, as rows do if nothing else is said, the lower of two images is pulled up."""
    style = (files("latentdiff.training.report") / "report.html.j2").read_text()
    rows = re.findall(r"[^{}]+\{[^{}]*display: flex[^{}]*\}", style)
    assert rows
    for row in rows:
        holds_images = "figure div" in row
        assert not holds_images or "align-items: flex-start" in row, row
