"""Captions as training reads them: one of several, tags shuffled, sometimes none; and those that are too long."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from latentdiff.errors import UsageError
from latentdiff.prompts.tokenize import dropped_text
from latentdiff.prompts.tokenizer import END_OF_WORD
from latentdiff.training.data.randomness import generator

LONG_CAPTIONS = ("cut", "chunk")
MAX_CHUNKS = 3


@dataclass(frozen=True)
class CaptionRules:
    """What happens to captions at each step.

    Attributes:
        dropout: probability of the empty caption, which classifier-free guidance needs (Ho & Salimans 2022).
        shuffle: put the parts between `separator` in another order.
        keep: so many first parts stay in their place.
        separator: between parts.
    """

    dropout: float = 0.1
    shuffle: bool = False
    keep: int = 0
    separator: str = ","

    def __post_init__(self) -> None:
        if not 0 <= self.dropout <= 1:
            raise UsageError(f"expected a caption dropout from 0 to 1, found {self.dropout}")
        if self.keep < 0 or not self.separator:
            raise UsageError("expected keep to be at least 0 and a separator that is not empty")


def choose(captions: Sequence[str], rules: CaptionRules, *, seed: int, step: int, row: int) -> str:
    """The caption of an image at a step, a pure function of (seed, step, row).

    Args:
        captions: those of the image.
        row: place in the global batch.
    """
    rng = generator(seed, "caption", step, row)
    dropped = rng.random() < rules.dropout
    caption = captions[int(rng.integers(len(captions)))]
    if dropped:
        return ""
    return _shuffled(caption, rules, rng) if rules.shuffle else caption


def _shuffled(caption: str, rules: CaptionRules, rng: np.random.Generator) -> str:
    parts = [part.strip() for part in caption.split(rules.separator)]
    first, rest = parts[: rules.keep], parts[rules.keep :]
    return f"{rules.separator} ".join([*first, *(rest[place] for place in rng.permutation(len(rest)))])


def lost_words(tokenizer: Any, caption: str, long: str = "cut", max_chunks: int = MAX_CHUNKS) -> str:
    """The end of a caption that the text encoder does not get to see, "" if it sees all."""
    if long == "cut":
        return dropped_text(tokenizer, caption)
    pieces = _pieces(tokenizer, caption)
    return tokenizer.decode([token for piece in pieces[max_chunks:] for token in piece]).strip()


def token_chunks(
    tokenizer: Any, captions: Sequence[str], long: str = "cut", max_chunks: int = MAX_CHUNKS
) -> np.ndarray:
    """Token ids of captions, (N, K, L) int64, each chunk with its start and end mark and padded to L.

    With `long="cut"` K is 1. With "chunk" a caption that is too long goes on in further chunks, which are cut between
    words; K is what the longest caption needs, at most `max_chunks`, and others are filled up with empty chunks. The
    text encoder encodes each chunk alone and the embeddings are joined along the sequence, (N, K * L, C).

    Args:
        tokenizer: a `Tokenizer`, or one of transformers; its `model_max_length` is L.
    """
    if long not in LONG_CAPTIONS:
        raise UsageError(f"expected long captions to be one of {', '.join(LONG_CAPTIONS)}, found {long!r}")
    if long == "cut":
        rows = [[_plain(tokenizer, caption)[: _room(tokenizer)]] for caption in captions]
    else:
        rows = [_pieces(tokenizer, caption)[:max_chunks] or [[]] for caption in captions]
    count = max(len(row) for row in rows)
    return np.array(
        [[_framed(tokenizer, piece) for piece in row + [[]] * (count - len(row))] for row in rows], np.int64
    )


def _room(tokenizer: Any) -> int:
    return tokenizer.model_max_length - 2


def _plain(tokenizer: Any, caption: str) -> list[int]:
    return tokenizer(caption, add_special_tokens=False, verbose=False)["input_ids"]


def _pieces(tokenizer: Any, caption: str) -> list[list[int]]:
    """Tokens in pieces that fit a chunk, cut at the end of a word where there is one."""
    ids = _plain(tokenizer, caption)
    tokens = tokenizer.convert_ids_to_tokens(ids)
    pieces = []
    while ids:
        end = min(_room(tokenizer), len(ids))
        if end < len(ids):
            end = next((place for place in range(end, 0, -1) if tokens[place - 1].endswith(END_OF_WORD)), end)
        pieces.append(ids[:end])
        ids, tokens = ids[end:], tokens[end:]
    return pieces


def _framed(tokenizer: Any, ids: list[int]) -> list[int]:
    framed = [tokenizer.bos_token_id, *ids, tokenizer.eos_token_id]
    return framed + [tokenizer.pad_token_id] * (tokenizer.model_max_length - len(framed))
