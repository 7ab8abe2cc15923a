"""Our tokenizer against transformers', which reads the same folders."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import CLIPTokenizer

from latentdiff.checkpoints.embedded import embedded_model
from latentdiff.checkpoints.tokenizer import clip_tokenizer_files, open_tokenizer, tokenizer_files
from latentdiff.prompts.tokenizer import Tokenizer

OLD_BOS, OLD_EOS = (
    {"content": f"<|{name}oftext|>", "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    for name in ("start", "end")
)


def as_published(pad_token: str, **more: Any) -> dict[str, str]:
    """The files as the hub has them for SD 1.x (pads with the end mark) and SD 2.x (pads with "!")."""
    marked = {"__type": "AddedToken"}
    config = {
        "add_prefix_space": False, "bos_token": marked | OLD_BOS, "do_lower_case": True, "eos_token": marked | OLD_EOS,
        "errors": "replace", "model_max_length": 77, "pad_token": pad_token, "tokenizer_class": "CLIPTokenizer",
        "unk_token": marked | OLD_EOS,
    }  # fmt: skip
    special = {"bos_token": OLD_BOS, "eos_token": OLD_EOS, "pad_token": pad_token, "unk_token": OLD_EOS}
    files = clip_tokenizer_files(pad_token)
    return files | {"tokenizer_config.json": json.dumps(config | more), "special_tokens_map.json": json.dumps(special)}


def peer_of(files: dict[str, str], folder: Path) -> CLIPTokenizer:
    folder.mkdir(exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    return CLIPTokenizer.from_pretrained(folder)


def files_in(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text(encoding="utf-8") for path in folder.iterdir()}


_WORD = {**OLD_EOS, "content": "<spot>", "normalized": True}
LAYOUTS: dict[str, dict[str, str]] = {
    "plain": clip_tokenizer_files("<|endoftext|>"),
    "plain, pads with !": clip_tokenizer_files("!"),
    "sd1": as_published("<|endoftext|>"),
    "sd2": as_published("!"),
    "words in a file of their own": as_published("!") | {"added_tokens.json": '{"<spot>": 49408, "<dog>": 49409}'},
    "words in the configuration": as_published(
        "!",
        added_tokens_decoder={
            "49406": {**OLD_BOS, "special": True, "normalized": False},
            "49407": {**OLD_EOS, "special": True},
            "49408": {**_WORD, "special": False},
        },
    ),
    "no notes": {
        name: text for name, text in clip_tokenizer_files("!").items() if name in ("vocab.json", "merges.txt")
    },
}


@pytest.fixture(scope="module", params=LAYOUTS)
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, CLIPTokenizer]:
    files = LAYOUTS[request.param]
    return Tokenizer(files), peer_of(files, tmp_path_factory.mktemp("peer"))


def definition(tokenizer: Any) -> dict[str, Any]:
    """What the library below was told: normalisation, splitting, merges, added tokens, marks."""
    backend = tokenizer._backend if isinstance(tokenizer, Tokenizer) else tokenizer.backend_tokenizer
    return json.loads(backend.to_str())


def assert_alike(ours: Tokenizer, peer: CLIPTokenizer) -> None:
    assert definition(ours) == definition(peer)
    assert len(ours) == len(peer)
    for mark in ("bos_token", "eos_token", "pad_token", "bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(ours, mark) == getattr(peer, mark), mark


def test_every_layout_is_understood_as_transformers_does(both):
    ours, peer = both
    assert_alike(ours, peer)
    assert ours.model_max_length == 77
    for text in ("a photo of a cat!", "hello!! <spot><SPOT> <|endoftext|>x <|ENDOFTEXT|>", "İstanbul ǅ ﬁ"):
        assert ours(text)["input_ids"] == peer(text)["input_ids"]


def test_a_tokenizer_saved_by_transformers(tmp_path):
    peer = peer_of(as_published("!"), tmp_path / "one")
    peer.add_tokens(["<spot>"])
    peer.save_pretrained(tmp_path / "two")
    ours = Tokenizer(files_in(tmp_path / "two"))
    assert_alike(ours, peer)
    assert len(ours("a <spot>!")["input_ids"]) == 5
    again = tokenizer_files(ours)
    assert {"vocab.json", "merges.txt"} <= set(again) and "tokenizer.json" not in again


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Tokenizer, CLIPTokenizer]]:
    folder = embedded_model() / "tokenizer"
    made = [
        (Tokenizer(files), peer_of(files, tmp_path_factory.mktemp("peer")))
        for files in (LAYOUTS["sd1"], LAYOUTS["sd2"])
    ]
    return [*made, (Tokenizer(files_in(folder)), CLIPTokenizer.from_pretrained(folder))]


PIECES = st.sampled_from(
    ["it's", "they'LL", "  ", "\t\n", "\u00a0", "\u3000", "...", "!!", "don't", "123", "٣", "½", "e\u0301", "Å", "İ", "ß",
     "日本", "한", "🦊", "👨\u200d👩\u200d👧", "🏳\ufe0f\u200d🌈", "\u200d", "\x00", "<|endoftext|>", "<|startoftext|>", "</w>",
     "Ünïcödé", "naïve", "x" * 200]
)  # fmt: skip
TEXTS = st.one_of(st.text(max_size=60), st.lists(st.one_of(PIECES, st.text(max_size=4)), max_size=30).map("".join))


@settings(max_examples=150, deadline=None)
@given(text=TEXTS)
@example(text="")
@example(text="a cat " * 60)
def test_same_ids_tokens_and_text(pairs, text):
    for ours, peer in pairs:
        plain = ours(text, return_offsets_mapping=True)
        expected = peer(text, return_offsets_mapping=True)
        assert plain["input_ids"] == expected["input_ids"]
        assert plain["offset_mapping"] == expected["offset_mapping"]
        assert ours(text, add_special_tokens=False)["input_ids"] == peer(text, add_special_tokens=False)["input_ids"]
        options = {"padding": "max_length", "truncation": True, "max_length": 12}
        assert ours(text, **options)["input_ids"] == peer(text, **options)["input_ids"]
        ids = plain["input_ids"]
        assert ours.convert_ids_to_tokens(ids) == peer.convert_ids_to_tokens(ids)
        assert ours.decode(ids) == peer.decode(ids)
        assert ours.decode(ids, skip_special_tokens=True) == peer.decode(ids, skip_special_tokens=True)


def test_several_texts_at_once(pairs):
    texts = ["a cat", "", "two dogs, and a very long list of other things that does not fit at all"]
    for ours, peer in pairs:
        for options in ({}, {"padding": "max_length"}, {"padding": "max_length", "truncation": True, "max_length": 8}):
            assert ours(texts, **options)["input_ids"] == peer(texts, **options)["input_ids"]
        cut = ours(texts, truncation=True, max_length=8, return_offsets_mapping=True)
        assert (
            cut["offset_mapping"]
            == peer(texts, truncation=True, max_length=8, return_offsets_mapping=True)["offset_mapping"]
        )


def test_new_words(pairs):
    for ours, peer in pairs:
        one, other = copy.deepcopy(ours), copy.deepcopy(peer)
        assert one.add_tokens(["<spot>", "<Ünï 2>"]) == other.add_tokens(["<spot>", "<Ünï 2>"]) == 2
        assert one.add_tokens(["<spot>"]) == 0 and len(one) == len(ours) + 2
        for text in ("a <spot>s", "<SPOT>!<spot><ünï 2>", " <spot> ", "<Ünï 2>"):
            assert one(text)["input_ids"] == other(text)["input_ids"]
        assert one.convert_tokens_to_ids(["<spot>", "nothing like it"]) == [len(ours), ours.eos_token_id]
        assert "<spot>" not in ours.convert_ids_to_tokens(ours("<spot>")["input_ids"])
        assert pickle.loads(pickle.dumps(one))("<spot>")["input_ids"] == one("<spot>")["input_ids"]


def test_files_are_given_back_as_they_were():
    files = LAYOUTS["sd2"]
    tokenizer = open_tokenizer(files)
    tokenizer.add_tokens(["<spot>"])
    assert tokenizer_files(tokenizer) == files


def test_unknown_padding():
    with pytest.raises(ValueError, match="'max_length', found 'longest'"):
        Tokenizer(LAYOUTS["plain"])("a", padding="longest")
