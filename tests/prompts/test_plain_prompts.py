from __future__ import annotations

import warnings

import pytest

from latentdiff.errors import UsageError
from latentdiff.prompts.notice import PromptWarning
from latentdiff.prompts.syntax import as_list, chunks_of, dropped_text, warn_of_lost_text
from tests import tiny


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return tiny.tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """Room for six tokens between the marks."""
    return tiny.tokenizer(tmp_path_factory.mktemp("short"), max_length=8)


def test_same_ids_as_transformers(tokenizer):
    for prompt in ("a photo of the cat", "", "Two  RED foxes!", "狐", "cat " * 100):
        (chunk,) = chunks_of(tokenizer, prompt, "plain")
        ids, weights = chunk.framed(tokenizer)
        assert ids == tokenizer(prompt, padding="max_length", truncation=True, max_length=77)["input_ids"]
        assert weights == [1.0] * 77


@pytest.mark.parametrize(
    ("prompt", "dropped"),
    [
        ("", ""),
        ("cat", ""),
        ("a cat dog fox on red", ""),  # six words fill it
        ("a cat dog fox on red blue", "blue"),
        ("a  Cat dog fox ON red,  blue  dog ", ",  blue  dog"),
        ("a cat dog fox on rockets", "rockets"),  # "rocket" would still fit, but its end does not
        ("a cat dog fox on 狐狸 dog", "狐狸 dog"),
        ("zzzzzzzzzz", "zzzzzzzzzz"),
    ],
)
def test_dropped_words_are_named(short, prompt, dropped):
    assert same_words(dropped_text(short, prompt), dropped)
    if short.is_fast:
        assert dropped_text(short, prompt) == dropped
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_of_lost_text(short, prompt)
    said = [str(w.message) for w in caught if w.category is PromptWarning]
    assert len(said) == bool(dropped)
    if said:
        assert said[0].startswith("the prompt has more than the 6 tokens that the model reads; dropped: ")
        assert same_words(said[0].split("dropped: ")[1], repr(dropped))


def same_words(one: str, other: str) -> bool:
    """Tokenizers of transformers 4 give back words, but not their case and the spaces between them."""
    return one.lower().replace(" ", "") == other.lower().replace(" ", "")


def test_tokenizers_without_offsets(short):
    class Slow:
        """As transformers' Python tokenizers are: no offsets."""

        is_fast = False
        model_max_length = short.model_max_length
        decode = short.decode
        convert_ids_to_tokens = short.convert_ids_to_tokens

        def __call__(self, text, return_offsets_mapping=False, **options):
            assert not return_offsets_mapping
            return short(text, **options)

    assert dropped_text(Slow(), "a cat dog fox on red blue dog") == "blue dog"
    assert dropped_text(Slow(), "a cat") == ""


def test_as_list():
    assert as_list("cat") == ["cat"]
    assert as_list(("cat", "")) == ["cat", ""]
    assert as_list("") == [""]


@pytest.mark.parametrize(
    ("prompt", "message"), [([], "empty list"), ([3], "found int: 3"), ("a \udc80", "valid Unicode")]
)
def test_not_prompts(prompt, message):
    with pytest.raises(UsageError, match=message):
        as_list(prompt)
