"""CLIP tokenizers as files: the bundled vocabulary of SD 1.x and 2.x, and writing and opening any other."""

from __future__ import annotations

import gzip
import json
import tempfile
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from latentdiff.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

_VOCABULARY_FILES = ("vocab.json", "merges.txt", "tokenizer.json")


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


def open_tokenizer(tokenizer: Mapping[str, str]) -> CLIPTokenizer:
    """Build transformers' tokenizer from its files.

    Raises:
        CheckpointError: the files are not those of a CLIP tokenizer.
    """
    from transformers import CLIPTokenizer

    with tempfile.TemporaryDirectory() as folder:
        for name, text in tokenizer.items():
            (Path(folder) / name).write_text(text, encoding="utf-8")
        try:
            return CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # the tokenizers library raises bare Exception for broken files
            raise CheckpointError(f"the tokenizer's files are damaged: {error}; download them again") from error


def tokenizer_files(tokenizer: CLIPTokenizer) -> dict[str, str]:
    """The files of a tokenizer as published models have them: vocab.json and merges.txt, whatever transformers writes."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        saved = {path.name: path.read_text(encoding="utf-8") for path in sorted(Path(folder).iterdir())}
    if "vocab.json" not in saved:
        model = json.loads(saved.pop("tokenizer.json"))["model"]
        merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
        saved |= _vocabulary_files(model["vocab"], merges)
    return saved


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
        "vocab.json": json.dumps(vocabulary, ensure_ascii=False),
        "merges.txt": "\n".join(["#version: 0.2", *merges]) + "\n",
    }


def _vocabulary(tokenizer: Mapping[str, str]) -> dict[str, int]:
    if "vocab.json" in tokenizer:
        return json.loads(tokenizer["vocab.json"])
    return json.loads(tokenizer["tokenizer.json"])["model"]["vocab"]


def _as_json(**contents: dict[str, object]) -> dict[str, str]:
    return {f"{name}.json": json.dumps(content, indent=2) + "\n" for name, content in contents.items()}
