"""Captions -> token ids, remembered, for batches that are made in several threads."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from latentdiff.training.data.captions import lost_words, token_chunks


class CaptionTokens:
    """Token ids of captions as the text encoder gets them.

    Args:
        tokenizer: a `Tokenizer`, or one of transformers; `model_max_length` is the length L of a chunk.
        long: "cut" the ends of captions with more tokens, or read them in "chunk"s.
    """

    def __init__(self, tokenizer: Any, long: str) -> None:
        self._tokenizer, self._long = tokenizer, long
        # Tokenizers are not made for several threads at once.
        self._lock = threading.Lock()
        self._ids = lru_cache(maxsize=65536)(self._tokenize)

    def chunks(self, caption: str) -> int:
        """How many chunks a caption takes."""
        return len(self._ids(caption))

    def is_cut(self, caption: str) -> bool:
        """Whether the text encoder does not see all of a caption."""
        with self._lock:
            return bool(lost_words(self._tokenizer, caption, self._long))

    def rows(self, captions: Sequence[str], chunks: int) -> np.ndarray:
        """Token ids (n, chunks, L) int32; captions that take fewer chunks end with empty ones."""
        empty = self._ids("")
        return np.stack([np.concatenate([ids, *[empty] * (chunks - len(ids))]) for ids in map(self._ids, captions)])

    def _tokenize(self, caption: str) -> np.ndarray:
        """(chunks of this caption, L)"""
        with self._lock:
            return token_chunks(self._tokenizer, [caption], self._long)[0].astype(np.int32)
