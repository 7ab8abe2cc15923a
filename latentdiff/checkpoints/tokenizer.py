"""CLIP tokenizers as files: the bundled vocabulary of SD 1.x and 2.x, and writing and opening any other."""

from __future__ import annotations

import gzip
import json
import tempfile
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from latentdiff.errors import CheckpointError
from latentdiff.prompts.tokenizer import MERGES, VOCABULARY, WHOLE, Tokenizer, vocabulary_and_merges
from latentdiff.reading.json import parse_object

_VOCABULARY_FILES = (VOCABULARY, MERGES, WHOLE)


def clip_tokenizer_files(pad_token: str) -> dict[str, str]:
    """The files of CLIP's tokenizer (49,408 tokens). SD 1.x pads with "<|endoftext|>", SD 2.x with "!"."""
    special = {
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "pad_token": pad_token,
        "unk_token": "<|endoftext|>",
    }
    config = {"do_lower_case": True, "model_max_length": 77, "tokenizer_class": "CLIPTokenizer", **special}
    return {**_clip_vocabulary(), **_as_json(special_tokens_map=special, tokenizer_config=config)}


def without_clip_vocabulary(tokenizer: Mapping[str, str]) -> dict[str, str]:
    """The files without the vocabulary, if it is CLIP's, which need not be stored again; else all of them."""
    if _vocabulary(tokenizer) != _vocabulary(_clip_vocabulary()):
        return dict(tokenizer)
    return {name: text for name, text in tokenizer.items() if name not in _VOCABULARY_FILES}


def with_clip_vocabulary(tokenizer: Mapping[str, str]) -> dict[str, str]:
    """Inverse of `without_clip_vocabulary`."""
    complete = any(name in tokenizer for name in ("vocab.json", "tokenizer.json"))
    return dict(tokenizer) if complete else {**_clip_vocabulary(), **tokenizer}


def open_tokenizer(tokenizer: Mapping[str, str]) -> Tokenizer:
    """Build a tokenizer from its files.

    Raises:
        CheckpointError: the files are not those of a CLIP tokenizer.
    """
    try:
        return Tokenizer(tokenizer)
    except CheckpointError as error:
        raise CheckpointError(f"the tokenizer's files are damaged: {error}") from error
    except Exception as error:  # the tokenizers library raises bare Exception for broken files
        said = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(f"the tokenizer's files are damaged: {said}; download them again") from error


def tokenizer_files(tokenizer: Any) -> dict[str, str]:
    """The files of a tokenizer, ours or transformers', as published models have them: with vocab.json and
    merges.txt."""
    saved = tokenizer.files if isinstance(tokenizer, Tokenizer) else _saved_by_transformers(tokenizer)
    files = with_vocabulary_files(saved)
    return files if VOCABULARY in saved else {name: text for name, text in files.items() if name != WHOLE}


def with_vocabulary_files(saved: Mapping[str, str]) -> dict[str, str]:
    """The files of a tokenizer, with vocab.json and merges.txt, which other programs read and tokenizer.json holds."""
    if VOCABULARY in saved:
        return dict(saved)
    vocabulary, merges = vocabulary_and_merges(saved)
    return dict(saved) | _vocabulary_files(vocabulary, [" ".join(pair) for pair in merges])


def _saved_by_transformers(tokenizer: Any) -> dict[str, str]:
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return {path.name: path.read_text(encoding="utf-8") for path in sorted(Path(folder).iterdir())}


@cache
def _clip_vocabulary() -> dict[str, str]:
    data = files("latentdiff.checkpoints").joinpath("data/clip_merges.txt.gz").read_bytes()
    merges = gzip.decompress(data).decode("utf-8").rstrip("\n").split("\n")
    symbols = _byte_symbols()
    tokens = [
        *symbols,
        *(f"{symbol}</w>" for symbol in symbols),
        *(merge.replace(" ", "") for merge in merges),
        "<|startoftext|>",
        "<|endoftext|>",
    ]
    return _vocabulary_files({token: index for index, token in enumerate(tokens)}, merges)


def _byte_symbols() -> list[str]:
    """A printable character for each of the 256 bytes, in the order of GPT-2's vocabulary (Radford et al. 2019)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [chr(code) for code in printable] + [chr(256 + i) for i in range(256 - len(printable))]


def _vocabulary_files(vocabulary: Mapping[str, int], merges: list[str]) -> dict[str, str]:
    return {
        VOCABULARY: json.dumps(vocabulary, ensure_ascii=False),
        MERGES: "\n".join(["#version: 0.2", *merges]) + "\n",
    }


def _vocabulary(tokenizer: Mapping[str, str]) -> dict[str, int]:
    if VOCABULARY in tokenizer:
        return parse_object(tokenizer[VOCABULARY], VOCABULARY)
    try:
        return vocabulary_and_merges(tokenizer)[0]
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{WHOLE} holds no vocabulary of a CLIP tokenizer; download it again") from error


def _as_json(**contents: dict[str, object]) -> dict[str, str]:
    return {f"{name}.json": json.dumps(content, indent=2) + "\n" for name, content in contents.items()}
