"""Attention weights and chunks: a table of prompts with what each grammar makes of them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from latentdiff.errors import UsageError
from latentdiff.prompts.weights import Run, a1111_runs, comfy_runs

UP, DOWN = 1.1, 1 / 1.1

# prompt -> (text, weight) in order; "|" is a BREAK
A1111 = {
    "": [],
    "a cat": [("a cat", 1)],
    "a (cat)": [("a ", 1), ("cat", UP)],
    "a ((cat))": [("a ", 1), ("cat", UP**2)],
    "a [cat]": [("a ", 1), ("cat", DOWN)],
    "a [[cat]]": [("a ", 1), ("cat", DOWN**2)],
    "([cat])": [("cat", 1)],
    "(cat:1.3)": [("cat", 1.3)],
    "(cat: 1.3 )": [("cat", 1.3)],
    "(cat:.5)": [("cat", 0.5)],
    "(cat:2)": [("cat", 2)],
    "(cat:0)": [("cat", 0)],
    "(cat:-1.5)": [("cat", -1.5)],
    "(cat:+1.5)": [("cat", 1.5)],
    "((cat:1.5))": [("cat", 1.65)],
    "((cat:1.5) dog:2)": [("cat", 3), (" dog", 2)],
    "(cat:1.5:2)": [("cat:1.5", 2)],
    "(cat:dog:2)": [("cat:dog", 2)],
    "(cat:dog)": [("cat:dog", UP)],
    "[cat:1.3]": [("cat:1.3", DOWN)],
    "cat:1.3": [("cat:1.3", 1)],
    "cat:1.3)": [("cat:1.3)", 1)],
    "cat)": [("cat)", 1)],
    "cat] dog": [("cat] dog", 1)],
    "(cat": [("cat", UP)],
    "((cat": [("cat", UP**2)],
    "[cat": [("cat", DOWN)],
    "(cat [dog": [("cat ", UP), ("dog", 1)],
    "(cat]": [("cat]", UP)],
    "(a [b) c]": [("a ", UP), ("b", 1), (" c", DOWN)],
    "\\(cat\\)": [("(cat)", 1)],
    "(\\(cat\\):1.2)": [("(cat)", 1.2)],
    "\\[cat\\]": [("[cat]", 1)],
    "a \\\\ b": [("a \\ b", 1)],
    "a \\b": [("a b", 1)],
    "cat\\": [("cat", 1)],
    "()": [],
    "(:1.5)": [],
    "(a)(b)": [("ab", UP)],
    "(a) (b)": [("a", UP), (" ", 1), ("b", UP)],
    "a:b": [("a:b", 1)],
    "(a:1e3)": [("a:1e3", UP)],
    "(a:1.2.3)": [("a:1.2.3", UP)],
    "red (blue:1.2) green": [("red ", 1), ("blue", 1.2), (" green", 1)],
    "a BREAK b": [("a", 1), "|", ("b", 1)],
    "BREAK b": ["|", ("b", 1)],
    "a BREAK": [("a", 1), "|"],
    "a BREAK BREAK b": [("a", 1), "|", "|", ("b", 1)],
    "aBREAK b": [("aBREAK b", 1)],
    "a break b": [("a break b", 1)],
    "(a BREAK b:1.2)": [("a", 1.2), "|", ("b", 1.2)],
    "a\nBREAK\nb": [("a", 1), "|", ("b", 1)],
    "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).": [
        ("a ", 1), ("house", 1.3 * UP * UP), (" ", UP), ("on", 1), (" a ", UP), ("hill", 0.55), (", sun, ", UP),
        ("sky", UP**4), (".", UP),
    ],
}  # fmt: skip
COMFY = {
    "": [],
    "a cat": [("a cat", 1)],
    "a (cat)": [("a ", 1), ("cat", UP)],
    "((cat))": [("cat", UP**2)],
    "(cat:1.3)": [("cat", 1.3)],
    "((cat:1.5))": [("cat", 1.5)],
    "((cat:1.5) dog:2)": [("cat", 1.5), (" dog", 2)],
    "((cat) dog:2)": [("cat", 2.2), (" dog", 2)],
    "(cat:1.5:2)": [("cat:1.5", 2)],
    "(cat:dog)": [("cat:dog", UP)],
    "(cat:1e0)": [("cat", 1)],
    "(:2)": [(":2", UP)],
    "[cat]": [("[cat]", 1)],
    "(cat": [("(cat", 1)],
    "cat) (dog": [("cat) (dog", 1)],
    "\\(cat\\)": [("(cat)", 1)],
    "(a \\) b:1.2)": [("a ) b", 1.2)],
    "a BREAK b": [("a BREAK b", 1)],
    "()": [],
}


def flat(stretches: list[list[Run]]) -> list:
    found: list = []
    for place, stretch in enumerate(stretches):
        found += ["|"] * (place > 0) + [(run.text, pytest.approx(run.weight, rel=1e-12)) for run in stretch]
    return found


@pytest.mark.parametrize("prompt", A1111)
def test_a1111(prompt):
    assert flat(a1111_runs(prompt)) == A1111[prompt]


@pytest.mark.parametrize("prompt", COMFY)
def test_comfy(prompt):
    assert flat(comfy_runs(prompt)) == COMFY[prompt]


def test_the_tables_are_long_enough():
    assert len(A1111) + len(COMFY) >= 60


def test_weights_that_are_no_numbers():
    with pytest.raises(UsageError, match="finite weights in the prompt, found inf for 'cat'"):
        a1111_runs(f"(cat:{'9' * 400})")
    with pytest.raises(UsageError, match="finite weights in the prompt, found nan"):
        comfy_runs("(cat:nan)")
    with pytest.raises(UsageError, match="at most 100 deep"):
        comfy_runs("(" * 200 + ")" * 200)


PIECES = st.lists(
    st.sampled_from(["cat", " ", "(", ")", "[", "]", ":", "1.5", "\\", ",", "BREAK", "|", "é"]), max_size=40
)


@given(PIECES.map("".join))
def test_no_letter_is_lost_or_invented(prompt):
    """Whatever the brackets, the text without them is in the runs, in order."""
    for runs in (a1111_runs, comfy_runs):
        words = "".join(run.text for stretch in runs(prompt) for run in stretch)
        assert words.count("cat") == prompt.count("cat") and words.count("é") == prompt.count("é")


@given(st.text(alphabet="abc ,.:", max_size=30))
def test_without_brackets_all_is_one_run(prompt):
    for runs in (a1111_runs, comfy_runs):
        assert runs(prompt) == [[Run(prompt)] if prompt else []]
