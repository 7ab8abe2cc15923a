"""Whether the judge's word is people's word, by hand."""

from __future__ import annotations

import json

import pytest

from latentdiff.errors import CheckpointError
from latentdiff.evaluation.agreement import AGREEMENT_NAME, Agreement, best_threshold, read_agreement, right_at
from latentdiff.evaluation.judge import Seen, Verdict
from latentdiff.evaluation.prompts import EvaluationPrompt, Requirement

CAT = EvaluationPrompt("single_object", "a cat", (Requirement("cat"),))


def cats(*scores):
    return [Verdict((Seen("cat", None, (0.0, 0.0, 1.0, 1.0), score),), "red") for score in scores]


def test_counts_by_hand():
    found = Agreement.of([True, True, True, False, False], [True, True, False, False, True])
    assert found == Agreement(right_by_both=2, wrong_by_both=1, false_right=1, false_wrong=1)
    assert found.images == 5 and found.share == 0.6
    assert str(found) == "60% of 5 images: it passed 1 of 2 wrong ones and failed 1 of 3 right ones"


def test_images_at_a_threshold():
    assert right_at(0.5, [CAT] * 3, cats(0.4, 0.5, 0.6)) == [False, False, True]


def test_the_threshold_between_what_people_call_wrong_and_right():
    verdicts = cats(0.05, 0.1, 0.2, 0.6, 0.7, 0.9)
    seen = [False, False, False, True, True, True]
    assert best_threshold([CAT] * 6, verdicts, seen) == pytest.approx(0.4, abs=0.02)  # the middle of 0.2 to 0.6


def test_of_equal_agreement_the_impartial_threshold_is_taken():
    # One mistake at least: at 0.3 a wrong image passes and a right one fails, else two of a kind.
    verdicts, seen = cats(0.1, 0.2, 0.4, 0.5, 0.8), [False, True, False, False, True]
    threshold = best_threshold([CAT] * 5, verdicts, seen)
    found = Agreement.of(right_at(threshold, [CAT] * 5, verdicts), seen)
    assert 0.5 <= threshold < 0.8 and (found.false_right, found.false_wrong) == (0, 1)
    verdicts, seen = cats(0.2, 0.4, 0.6, 0.8), [True, False, True, False]
    threshold = best_threshold([CAT] * 4, verdicts, seen)
    found = Agreement.of(right_at(threshold, [CAT] * 4, verdicts), seen)
    assert (found.false_right, found.false_wrong) == (1, 1)


def test_read_again(tmp_path):
    assert read_agreement(tmp_path) is None
    found = Agreement(50, 40, 4, 6)
    (tmp_path / AGREEMENT_NAME).write_text(json.dumps(found.to_json()))
    assert read_agreement(tmp_path) == found


@pytest.mark.parametrize(
    "text", ["{", "{}", '{"taste": 1}', '{"right_by_both": -1, "wrong_by_both": 2, "false_right": 0, "false_wrong": 0}',
             '{"right_by_both": 0, "wrong_by_both": 0, "false_right": 0, "false_wrong": 0}',
             '{"right_by_both": [], "wrong_by_both": 0, "false_right": 0, "false_wrong": 0}'],
)  # fmt: skip
def test_damaged(tmp_path, text):
    (tmp_path / AGREEMENT_NAME).write_text(text)
    with pytest.raises(CheckpointError, match=AGREEMENT_NAME):
        read_agreement(tmp_path)
