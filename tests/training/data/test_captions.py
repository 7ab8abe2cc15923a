from collections import Counter

import numpy as np
import pytest

from latentdiff.errors import UsageError
from latentdiff.prompts.syntax import chunks_of
from latentdiff.training.data.captions import CaptionRules, choose, lost_words, token_chunks, worded
from tests.tiny import tokenizer as tiny_tokenizer

LENGTH = 8  # two marks and six words


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"), max_length=LENGTH)


def chosen(captions, rules, count=2000, seed=0):
    return [choose(captions, rules, seed=seed, step=step, row=row) for step in range(count // 4) for row in range(4)]


def test_choice_among_several():
    counts = Counter(chosen(["a", "b", "c"], CaptionRules(dropout=0)))
    assert set(counts) == {"a", "b", "c"} and min(counts.values()) > 580


def test_dropout():
    share = chosen(["a"], CaptionRules(dropout=0.1)).count("") / 2000
    assert 0.08 < share < 0.12
    assert "" not in chosen(["a"], CaptionRules(dropout=0)) and set(chosen(["a"], CaptionRules(dropout=1))) == {""}


def test_dropout_does_not_change_what_is_chosen():
    kept, dropped = (chosen(["a", "b"], CaptionRules(dropout=share)) for share in (0.0, 0.5))
    assert all(one == other or other == "" for one, other in zip(kept, dropped, strict=True))


def test_shuffling_keeps_the_first_parts():
    rules = CaptionRules(dropout=0, shuffle=True, keep=1)
    seen = set(chosen(["x, b,c , d"], rules, 400))
    assert len(seen) == 6 and all(caption.startswith("x, ") for caption in seen)
    assert {frozenset(caption.split(", ")) for caption in seen} == {frozenset("xbcd")}


def test_dropping_parts_keeps_the_first_and_the_order():
    seen = Counter(chosen(["x, b,c , d"], CaptionRules(dropout=0, part_dropout=0.25, keep=1), 4000))
    assert set(seen) == {"x, b, c, d", "x, b, c", "x, b, d", "x, c, d", "x, b", "x, c", "x, d", "x"}
    assert abs(seen["x, b, c, d"] / 4000 - 0.75**3) < 0.03 and seen["x"] < 120
    shuffled = set(chosen(["x, b, c"], CaptionRules(dropout=0, part_dropout=0.25, shuffle=True), 4000))
    assert {"x, b, c", "c, b, x", "b", ""} < shuffled


def test_prefixes():
    assert worded(("a cat", ""), "sks style,") == ("sks style, a cat", "sks style,")
    assert worded(("a cat", ""), "", ", in oil") == ("a cat, in oil", ", in oil")
    assert worded(("a cat",), "sks", "in oil") == ("sks a cat in oil",) and worded(("",), "", "in oil") == ("in oil",)
    assert worded((), "sks") == ("sks",) and worded(("a",), "") == ("a",) and worded((), "") == ()


def test_pure_function_of_its_key():
    rules = CaptionRules(shuffle=True)
    captions = ["a, b, c, d", "e, f, g, h"]
    assert chosen(captions, rules, 40) == chosen(captions, rules, 40) != chosen(captions, rules, 40, seed=1)


@pytest.mark.parametrize("wrong", [{"dropout": 1.1}, {"dropout": -0.1}, {"keep": -1}, {"separator": ""}, {"part_dropout": 1.0}])
def test_wrong_rules(wrong):
    with pytest.raises(UsageError):
        CaptionRules(**wrong)


CAPTIONS = ["", "a photo of the cat", "a photo of the cat on red cat left of the dog"]


@pytest.mark.filterwarnings("ignore::latentdiff.prompts.notice.PromptWarning")
def test_cut_captions_are_those_of_generate(tokenizer):
    found = token_chunks(tokenizer, CAPTIONS)
    expected = tokenizer(CAPTIONS, padding="max_length", truncation=True, max_length=LENGTH)["input_ids"]
    assert found.shape == (3, 1, LENGTH) and np.array_equal(found[:, 0], expected)
    assert lost_words(tokenizer, CAPTIONS[2]) == "red cat left of the dog"
    assert not lost_words(tokenizer, CAPTIONS[1])


def test_chunks_hold_the_whole_caption(tokenizer):
    found = token_chunks(tokenizer, CAPTIONS, "chunk")
    assert found.shape == (3, 2, LENGTH)
    assert (found[:, :, 0] == tokenizer.bos_token_id).all()
    words = [
        token for chunk in found[2] for token in chunk if token not in (tokenizer.bos_token_id, tokenizer.eos_token_id)
    ]
    assert tokenizer.decode(words).split() == CAPTIONS[2].split()
    assert np.array_equal(found[1, 1], found[0, 0]) and np.array_equal(found[0, 0], found[0, 1])  # the empty chunk
    assert not lost_words(tokenizer, CAPTIONS[2], "chunk")


def test_chunks_are_cut_where_prompts_are(tokenizer):
    """Behind a comma where one is near; else where the chunk is full, within a word if need be."""
    for caption in ("a cat , dog fox on red blue", "a a a a a fix dog"):
        found = token_chunks(tokenizer, [caption], "chunk")[0]
        assert found.tolist() == [chunk.framed(tokenizer)[0] for chunk in chunks_of(tokenizer, caption, "a1111")]
    second = tokenizer.decode(token_chunks(tokenizer, ["a cat , dog fox on red"], "chunk")[0, 1])
    assert "dog fox" in second and "cat" not in second


def test_a_caption_of_5000_words(tokenizer):
    long = "cat " * 4999 + "dog"
    assert token_chunks(tokenizer, [long], "chunk", 3).shape == (1, 3, LENGTH)
    assert len(lost_words(tokenizer, long, "chunk", 3).split()) == 5000 - 18
    assert len(lost_words(tokenizer, long).split()) == 5000 - 6
    word = "x" * 50  # longer than a chunk
    assert token_chunks(tokenizer, [word], "chunk", 3).shape == (1, 3, LENGTH)


def test_unknown_way(tokenizer):
    with pytest.raises(UsageError, match="one of cut, chunk"):
        token_chunks(tokenizer, ["a"], "fold")
