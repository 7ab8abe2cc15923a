"""Train a small CLIP tokenizer on the captions of a data set.

    python tools/make_tokenizer.py data/scenes data/tokenizer

It is CLIP's byte-level BPE (Radford et al. 2021, after Sennrich et al. 2016) with a smaller vocabulary: words of the
captions become single tokens, and every other text still has tokens, down to single bytes. transformers' CLIPTokenizer
reads the files.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path

import click
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from latentdiff.errors import LatentDiffError
from latentdiff.files import atomic_path
from latentdiff.training.data.dataset import list_source

START, END = "<|startoftext|>", "<|endoftext|>"
WORD_END = "</w>"

# How CLIP cuts text before BPE: contractions, words, single digits, runs of other signs.
_PIECES = r"""'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"""


def train_bpe(captions: Iterable[str], vocabulary_size: int) -> tuple[dict[str, int], list[str]]:
    """Vocabulary (token -> id) and merges ("left right"), in the order in which BPE applies them."""
    bytes_ = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix=WORD_END))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size, initial_alphabet=bytes_, end_of_word_suffix=WORD_END, show_progress=False
    )
    tokenizer.train_from_iterator(captions, trainer)
    merges = [" ".join(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]
    # Every byte can stand inside a word and at its end, seen in training or not.
    tokens = [*bytes_, *(byte + WORD_END for byte in bytes_), *(merge.replace(" ", "") for merge in merges), START, END]
    return {token: index for index, token in enumerate(dict.fromkeys(tokens))}, merges


def write_files(folder: Path, vocabulary: dict[str, int], merges: list[str], max_length: int) -> None:
    """The files of a CLIP tokenizer as published models have them."""
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": max_length, "do_lower_case": True, **special}
    files = {
        "vocab.json": json.dumps(vocabulary, ensure_ascii=False),
        "merges.txt": "\n".join(["#version: 0.2", *merges]) + "\n",
        "special_tokens_map.json": json.dumps(special, indent=2),
        "tokenizer_config.json": json.dumps(settings, indent=2),
    }
    for name, text in files.items():
        with atomic_path(folder / name) as temporary:
            temporary.write_text(text, encoding="utf-8")


@click.command(help=__doc__.split("\n\n")[0])
@click.argument("data", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path, file_okay=False))
@click.option("--vocabulary", type=click.IntRange(600), default=1400, show_default=True, help="Tokens at most.")
@click.option("--max-length", type=click.IntRange(8), default=32, show_default=True, help="Longest prompt in tokens.")
def main(data: Path, out: Path, vocabulary: int, max_length: int) -> None:
    try:
        tokens, merges = train_bpe((text for entry in list_source(data).entries for text in entry.captions), vocabulary)
        write_files(out, tokens, merges, max_length)
    except LatentDiffError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
