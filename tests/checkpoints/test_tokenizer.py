"""The bundled CLIP vocabulary, and tokenizers as files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from latentdiff.checkpoints.tokenizer import (
    clip_tokenizer_files,
    open_tokenizer,
    tokenizer_files,
    with_clip_vocabulary,
    without_clip_vocabulary,
)
from latentdiff.errors import CheckpointError
from tests import tiny


@pytest.fixture(scope="module")
def clip() -> dict[str, str]:
    return clip_tokenizer_files("<|endoftext|>")


def test_bundled_vocabulary_is_that_of_clip(clip: dict[str, str]):
    """Ids that CLIP's own tokenizer gives (openai/clip-vit-large-patch14)."""
    vocabulary = json.loads(clip["vocab.json"])
    assert len(vocabulary) == 49408 == len(set(vocabulary.values()))
    assert (vocabulary["<|startoftext|>"], vocabulary["<|endoftext|>"]) == (49406, 49407)
    assert clip["merges.txt"].count("\n") == 48895
    ids = open_tokenizer(clip)("a photo of a cat")["input_ids"]
    assert ids == [49406, 320, 1125, 539, 320, 2368, 49407]


def test_padding_differs_between_the_families():
    for token, number in (("<|endoftext|>", 49407), ("!", 0)):
        ids = open_tokenizer(clip_tokenizer_files(token))("a", padding="max_length")["input_ids"]
        assert ids == [49406, 320, 49407] + [number] * 74


@pytest.mark.parametrize("text", ["", "Ünïcödé — 日本 🦊", "it's 123", "  spaces\tand\nlines "])
def test_files_of_a_tokenizer_rebuild_it(clip: dict[str, str], text: str):
    tokenizer = open_tokenizer(clip)
    again = open_tokenizer(tokenizer_files(tokenizer))
    assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert again.model_max_length == 77


def test_vocabulary_of_clip_is_left_out_and_put_back(clip: dict[str, str]):
    short = without_clip_vocabulary(clip)
    assert set(short) == {"special_tokens_map.json", "tokenizer_config.json"}
    assert with_clip_vocabulary(short) == clip


def test_any_other_vocabulary_is_kept(tmp_path: Path):
    files = tokenizer_files(tiny.tokenizer(tmp_path))
    assert without_clip_vocabulary(files) == files == with_clip_vocabulary(files)


def test_broken_files_are_said_to_be_so(clip: dict[str, str]):
    with pytest.raises(CheckpointError, match="tokenizer's files are damaged"):
        open_tokenizer({**clip, "vocab.json": "{"})
