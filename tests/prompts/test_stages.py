"""Text that changes over the steps, against the documented examples of the web UI and by hand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from latentdiff.errors import UsageError
from latentdiff.prompts.stages import Stage, stages_of

# prompt -> [(last step, text)] over 10 steps; the first eleven are examples of AUTOMATIC1111's own
STAGES = {
    "test": [(10, "test")],
    "a [b:3]": [(3, "a "), (10, "a b")],
    "a [b: 3]": [(3, "a "), (10, "a b")],
    "a [[[b]]:2]": [(2, "a "), (10, "a [[b]]")],
    "[(a:2):3]": [(3, ""), (10, "(a:2)")],
    "a [b : c : 1] d": [(1, "a b  d"), (10, "a  c  d")],
    "a[b:[c:d:2]:1]e": [(1, "abe"), (2, "ace"), (10, "ade")],
    "a [unbalanced": [(10, "a [unbalanced")],
    "a [b:.5] c": [(5, "a  c"), (10, "a b c")],
    "a [{b|d{:.5] c": [(10, "a [{b|d{:.5] c")],
    "((a][:b:c [d:3]": [(3, "((a][:b:c "), (10, "((a][:b:c d")],
    "[a:b:0.25]": [(2, "a"), (10, "b")],
    "[a:b:5]": [(5, "a"), (10, "b")],
    "[a::4]": [(4, "a"), (10, "")],
    "[:b:4]": [(4, ""), (10, "b")],
    "[a:b:1.0]": [(10, "a")],
    "[a:b:1]": [(1, "a"), (10, "b")],
    "[a:b:0]": [(10, "b")],
    "[a:b:0.0]": [(10, "b")],
    "[a:b:-2]": [(10, "b")],
    "[a:b:99]": [(10, "a")],
    "[a:1.2]": [(10, "")],
    "[a:b]": [(10, "[a:b]")],
    "[a:b:c]": [(10, "[a:b:c]")],
    "[a:b:c:3]": [(10, "[a:b:c:3]")],
    "[a]": [(10, "[a]")],
    "(a:1.3)": [(10, "(a:1.3)")],
    "[(a:1.2):(b:0.8):5]": [(5, "(a:1.2)"), (10, "(b:0.8)")],
    "([a:b:5]:1.3)": [(5, "(a:1.3)"), (10, "(b:1.3)")],
    "\\[a:b:5\\]": [(10, "\\[a:b:5\\]")],
    "[a\\:b:5]": [(5, ""), (10, "a\\:b")],
    "[a (b:0.5]": [(10, "[a (b:0.5]")],
    "[x:y:z:[a:b:0.5]]": [(5, "[x:y:z:a]"), (10, "[x:y:z:b]")],
    "[a:b:5] and [c:d:5]": [(5, "a and c"), (10, "b and d")],
    "[a:b:3] [c:d:6]": [(3, "a c"), (6, "b c"), (10, "b d")],
    "a|b [c:5]": [(10, "a|b [c:5]")],
    "(a|b)": [(10, "(a|b)")],
    "[a|b:3]": [(10, "[a|b:3]")],
    "tail\\": [(10, "tail\\")],
}


@pytest.mark.parametrize("prompt", STAGES)
def test_stages(prompt):
    assert stages_of(prompt, 10) == [Stage(last, text) for last, text in STAGES[prompt]]


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        ("[a|b]", ["a", "b", "a", "b", "a"]),
        ("[a|b|c]", ["a", "b", "c", "a", "b"]),
        ("[fe|]male", ["female", "male", "female", "male", "female"]),
        ("[|b]", ["", "b", "", "b", ""]),
        ("[a|[b|c]]", ["a", "c", "a", "c", "a"]),
        ("[[a|b]:c:3]", ["a", "b", "a", "c", "c"]),
        ("[(a:1.2)|b]", ["(a:1.2)", "b", "(a:1.2)", "b", "(a:1.2)"]),
        ("[[x:y:2]|b]", ["x", "b", "y", "b", "y"]),
    ],
)
def test_alternation(prompt, texts):
    stages = stages_of(prompt, 5)
    assert [next(stage.text for stage in stages if step <= stage.last) for step in range(1, 6)] == texts


def test_the_fraction_follows_the_steps():
    for steps in (1, 4, 20, 50):
        found = stages_of("[a:b:0.5]", steps)
        assert [stage.last for stage in found if stage.text == "a"] == ([steps // 2] if steps > 1 else [])


def test_absurd_nesting_is_refused():
    with pytest.raises(UsageError, match="at most 100 deep"):
        stages_of("[" * 200 + "a" + ":5]" * 200, 10)
    assert stages_of("[" * 5000, 10) == [Stage(10, "[" * 5000)]


PIECES = st.lists(st.sampled_from([*"ab[]()|:\\ ", "0.5", "3"]), max_size=30).map("".join)


@given(PIECES, st.integers(1, 12))
def test_every_prompt_has_a_text_at_every_step(prompt, steps):
    stages = stages_of(prompt, steps)
    assert stages[-1].last == steps and [stage.last for stage in stages] == sorted({stage.last for stage in stages})
    assert all(one.text != other.text for one, other in zip(stages, stages[1:], strict=False))
