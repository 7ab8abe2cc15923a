import numpy as np
import pytest

from latentdiff.training.data.tokens import CaptionTokens
from tests import tiny


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return tiny.tokenizer(tmp_path_factory.mktemp("tokenizer"), max_length=16)


def test_rows_are_what_transformers_makes_of_the_captions(tokenizer):
    captions = ["cat", "cat " * 14, "cat " * 15, ""]
    tokens = CaptionTokens(tokenizer, "cut")
    rows = tokens.rows(captions, 1)
    assert rows.shape == (4, 1, 16) and rows.dtype == np.int32
    theirs = tokenizer(captions, padding="max_length", truncation=True, max_length=16)["input_ids"]
    assert rows[:, 0].tolist() == theirs
    assert [tokens.is_cut(caption) for caption in captions] == [False, False, True, False]


def test_long_captions_take_several_chunks(tokenizer):
    tokens = CaptionTokens(tokenizer, "chunk")
    assert [tokens.chunks(caption) for caption in ("cat", "cat " * 15)] == [1, 2]
    rows = tokens.rows(["cat", "cat " * 15], 2)
    assert rows.shape == (2, 2, 16)
    assert np.array_equal(rows[0, 1], tokens.rows([""], 1)[0, 0])
