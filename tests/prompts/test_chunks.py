"""Where prompts are cut: tokens, weights and chunk borders, with CLIP's own vocabulary."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latentdiff.checkpoints.tokenizer import clip_tokenizer_files
from latentdiff.prompts.notice import PromptWarning
from latentdiff.prompts.syntax import chunks_of
from latentdiff.prompts.tokenizer import Tokenizer

COMMA, CAT, DOG = 267, 2368, 1929


@pytest.fixture(scope="module")
def clip() -> Tokenizer:
    return Tokenizer(clip_tokenizer_files("<|endoftext|>"))


def borders(tokenizer: Tokenizer, prompt: str, syntax: str = "a1111") -> list[int]:
    """How many tokens each chunk holds."""
    return [len(chunk) for chunk in chunks_of(tokenizer, prompt, syntax)]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("", [0]),
        ("cat", [1]),
        ("cat " * 75, [75]),
        ("cat " * 76, [75, 1]),
        ("cat " * 300, [75] * 4),
        ("cat " * 74 + ",", [75]),
        ("cat " * 75 + ", dog", [75, 2]),  # the comma itself does not fit, and none came before
        ("cat " * 60 + ", " + "dog " * 20, [61, 20]),
        ("cat " * 55 + ", " + "dog " * 20, [56, 20]),  # 20 tokens back, the comma counted: still near
        ("cat " * 54 + ", " + "dog " * 21, [75, 1]),  # 21 back: too far
        ("cat , " * 50, [75, 25]),  # the token that does not fit is the comma itself
        ("cat BREAK dog", [1, 1]),
        ("BREAK cat", [0, 1]),
        ("cat BREAK", [1]),
        ("cat BREAK BREAK dog", [1, 0, 1]),
        ("cat " * 80 + "BREAK dog", [75, 5, 1]),
        ("(cat:1.2) dog", [2]),
        ("(cat " * 76, [75, 1]),
    ],
)
def test_borders_of_a1111(clip, prompt, expected):
    assert borders(clip, prompt) == expected


def test_tokens_weights_and_borders_together(clip):
    first, second = chunks_of(clip, "cat " * 70 + ", (dog " * 1 + "cat:1.3)" + " dog" * 5, "a1111")
    assert first.ids == [CAT] * 70 + [COMMA] and first.weights == [1.0] * 71
    assert second.ids == [DOG, CAT] + [DOG] * 5 and second.weights == [1.3, 1.3] + [1.0] * 5
    ids, weights = second.framed(clip)
    assert ids == [49406, DOG, CAT, *[DOG] * 5, *[49407] * 69] and weights == [1, 1.3, 1.3, *[1] * 74]


def test_the_padding_is_the_tokenizers_own():
    ids, _ = chunks_of(Tokenizer(clip_tokenizer_files("!")), "cat", "a1111")[0].framed(
        Tokenizer(clip_tokenizer_files("!"))
    )
    assert ids == [49406, CAT, 49407, *[0] * 74]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("", [0]),
        ("cat " * 75, [75]),
        ("cat " * 74 + "qwxzvk", [74, 4]),  # a word of 4 tokens is not cut
        ("cat " * 70 + "qwxzvk" * 4, [75, 14]),  # one of 8 or more is
        ("cat " * 60 + ", " + "dog " * 20, [75, 6]),  # no comma rule
        ("cat BREAK dog", [3]),
    ],
)
def test_borders_of_comfy(clip, prompt, expected):
    pieces = {"qwxzvk": len(clip("qwxzvk", add_special_tokens=False)["input_ids"])}
    assert pieces["qwxzvk"] == 4
    assert borders(clip, prompt, "comfy") == expected


def test_plain_keeps_the_first_chunk(clip):
    (chunk,) = chunks_of(clip, "(cat:1.2) " + "dog " * 100, "plain")
    assert len(chunk) == 75 and not chunk.is_weighted
    assert clip.decode(chunk.ids).startswith("( cat : 1 . 2 )")


def test_short_encoders_have_short_chunks(clip):
    files = clip_tokenizer_files("<|endoftext|>")
    files["tokenizer_config.json"] = files["tokenizer_config.json"].replace("77", "32")
    short = Tokenizer(files)
    assert short.model_max_length == 32
    assert borders(short, "cat " * 61) == [30, 30, 1]


def test_vectors_of_a_learned_word_stay_together(clip):
    tokenizer = Tokenizer(clip_tokenizer_files("<|endoftext|>"))
    tokenizer.add_tokens(["spot", "spot#1", "spot#2"])
    first = tokenizer.convert_tokens_to_ids("spot")
    tokenizer.expansions[first] = (first, first + 1, first + 2)
    one, two = chunks_of(tokenizer, "cat " * 74 + "(spot:1.5) cat", "a1111")
    assert len(one) == 74 and two.ids == [first, first + 1, first + 2, CAT] and two.weights == [1.5] * 3 + [1.0]
    for syntax in ("a1111", "comfy"):
        (chunk,) = chunks_of(tokenizer, "embedding:spot.pt cat", syntax)
        assert chunk.ids == [first, first + 1, first + 2, CAT]
        with pytest.warns(PromptWarning, match="no embedding called 'other' is loaded"):
            assert chunks_of(tokenizer, "embedding:other cat", syntax)[0].ids == [CAT]


PROMPTS = st.lists(st.sampled_from(["cat", "dog", ",", "(", ")", "qwxzvk"]), max_size=250).map(" ".join)


@settings(max_examples=60, deadline=None)
@given(PROMPTS)
def test_no_token_is_lost(clip, prompt):
    """Whatever the borders, the chunks hold the tokens of the prompt without its brackets, in order."""
    words = prompt.replace("(", "").replace(")", "") if prompt.count(")") == 0 else None
    chunks = chunks_of(clip, prompt, "a1111")
    assert all(len(chunk) <= 75 for chunk in chunks)
    if words is not None:
        assert sum((chunk.ids for chunk in chunks), []) == clip(words, add_special_tokens=False)["input_ids"]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from(["cat", "dog,", "a"]), max_size=70).map(" ".join))
def test_short_prompts_without_grammar_are_the_same_in_all_syntaxes(clip, prompt):
    if len(clip(prompt, add_special_tokens=False)["input_ids"]) <= 75:
        assert chunks_of(clip, prompt, "a1111") == chunks_of(clip, prompt, "plain") == chunks_of(clip, prompt, "comfy")
