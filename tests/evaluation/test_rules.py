"""GenEval's rules, in closed form."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from latentdiff.evaluation.judge import Seen, Verdict
from latentdiff.evaluation.prompts import EvaluationPrompt, Requirement
from latentdiff.evaluation.rules import background_fits, failures, objects_of, relations

OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


def box(x, y, width=0.2, height=0.2):
    return (x - width / 2, y - height / 2, x + width / 2, y + height / 2)


def seen(*things, background="red"):
    return Verdict(tuple(Seen(*thing) for thing in things), background)


def asking(*include, task="two_object", exclude=()):
    return EvaluationPrompt(task, "a prompt", include, exclude, "red")


def reasons(prompt, verdict):
    return [one.reason for one in failures(prompt, verdict)]


CAT, DOG = ("cat", None, box(0.2, 0.5), 0.9), ("dog", "red", box(0.8, 0.5), 0.8)


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        ((0.2, 0.5), {"left of"}),
        ((0.8, 0.5), {"right of"}),
        ((0.5, 0.2), {"above"}),
        ((0.5, 0.8), {"below"}),
        ((0.2, 0.2), {"left of", "above"}),  # the diagonal holds in both senses
        ((0.5, 0.5), set()),
        ((0.47, 0.5), set()),  # nearer than a tenth of both widths
    ],
)
def test_relation_to_an_object_in_the_middle(place, expected):
    assert relations(box(*place), box(0.5, 0.5)) == expected


def test_relation_threshold_by_hand():
    # dx = -0.4, dy = 0.3, distance 0.5; shortened by 0.1 * (0.2 + 0.2): (0.36, 0.26) / 0.5 = (0.72, 0.52), both above
    # 0.5.
    assert relations(box(0.1, 0.8), box(0.5, 0.5)) == {"left of", "below"}
    # With heights of 0.3 the vertical part is (0.3 - 0.06) / 0.5 = 0.48.
    assert relations(box(0.1, 0.8, height=0.3), box(0.5, 0.5, height=0.3)) == {"left of"}


centres = st.floats(0, 1, width=32)
lengths = st.floats(0.0625, 0.5, width=32)
boxes = st.builds(box, centres, centres, lengths, lengths)


@given(boxes, boxes)
def test_relation_reverses_with_its_objects(a, b):
    assert relations(b, a) == {OPPOSITE[name] for name in relations(a, b)}


@given(boxes, boxes)
def test_no_object_is_on_both_sides(a, b):
    held = relations(a, b)
    assert not any(OPPOSITE[name] in held for name in held)


def test_present():
    assert failures(asking(Requirement("cat")), seen(CAT)) == []
    assert reasons(asking(Requirement("cat"), Requirement("dog")), seen(CAT)) == ["expected 1 dog, saw 0"]


def test_uninvited_objects_do_not_fail_an_image():
    assert failures(asking(Requirement("cat")), seen(CAT, CAT, DOG)) == []


@pytest.mark.parametrize(("shown", "right"), [(1, False), (2, True), (3, False)])
def test_counting_is_exact(shown, right):
    prompt = asking(Requirement("cat", 2), task="counting", exclude=[("cat", 3)])
    assert (failures(prompt, seen(*[CAT] * shown)) == []) is right


def test_colour():
    assert failures(asking(Requirement("dog", colour="red")), seen(DOG)) == []
    assert reasons(asking(Requirement("dog", colour="blue")), seen(DOG)) == ["expected 1 blue dog, saw red"]
    assert reasons(asking(Requirement("cat", colour="blue")), seen(CAT)) == ["expected 1 blue cat, saw own colours"]


def test_the_surest_object_is_looked_at():
    unsure = ("dog", "blue", box(0.3, 0.3), 0.6)
    assert failures(asking(Requirement("dog", colour="blue")), seen(unsure, DOG))
    assert [thing.colour for thing in objects_of("dog", seen(unsure, DOG))] == ["red", "blue"]


def test_attribution_needs_each_colour_on_its_own_object():
    wanted = asking(Requirement("cat", colour="blue"), Requirement("dog", colour="red"), task="color_attr")
    assert failures(wanted, seen(("cat", "blue", box(0.2, 0.5), 0.9), DOG)) == []
    assert len(failures(wanted, seen(("cat", "red", box(0.2, 0.5), 0.9), ("dog", "blue", box(0.8, 0.5), 0.9)))) == 2


def test_position():
    def wanted(relation):
        return asking(Requirement("dog"), Requirement("cat", position=(relation, 0)), task="position")

    assert failures(wanted("left of"), seen(CAT, DOG)) == []
    assert reasons(wanted("above"), seen(CAT, DOG)) == ["expected the cat above the dog"]
    assert reasons(wanted("left of"), seen(CAT)) == ["expected 1 dog, saw 0", "nothing for the cat to be left of"]


def test_background_is_scored_apart():
    prompt = asking(Requirement("cat"))
    assert failures(prompt, seen(CAT, background="blue")) == []
    assert background_fits(prompt, seen(background="red")) and not background_fits(prompt, seen(background="blue"))


@pytest.mark.parametrize(
    ("need", "verdict", "kind"),
    [
        (Requirement("cat"), seen(), "missing"),
        (Requirement("cat"), seen(DOG), "wrong thing"),
        (Requirement("cat"), replace(seen(DOG), unclear=1), "not clear"),
        (Requirement("cat", 2), seen(CAT), "wrong count"),
        (Requirement("cat", 2), replace(seen(CAT), unclear=1), "not clear"),
        (Requirement("dog", colour="blue"), seen(DOG), "wrong colour"),
    ],
)
def test_kinds_of_failures(need, verdict, kind):
    assert [one.kind for one in failures(asking(need), verdict)] == [kind]


def test_another_thing_that_was_asked_for_is_not_a_wrong_one():
    assert [one.kind for one in failures(asking(Requirement("cat"), Requirement("dog")), seen(DOG))] == ["missing"]


def test_kinds_of_counting_and_position():
    three = asking(Requirement("cat", 2), task="counting", exclude=[("cat", 3)])
    assert [one.kind for one in failures(three, seen(CAT, CAT, CAT))] == ["wrong count"]
    above = asking(Requirement("dog"), Requirement("cat", position=("above", 0)), task="position")
    assert [one.kind for one in failures(above, seen(CAT, DOG))] == ["wrong relation"]
    assert [one.kind for one in failures(above, seen(CAT))] == ["missing", "wrong relation"]  # the cause comes first
