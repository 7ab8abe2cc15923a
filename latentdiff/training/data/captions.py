"""Captions as training reads them: one of several, tags shuffled, sometimes none; and those that are too long."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from latentdiff.errors import UsageError
from latentdiff.prompts.syntax import Chunk, chunks_by_commas, cut, dropped_text
from latentdiff.prompts.weights import Run
from latentdiff.training.data.randomness import generator

LONG_CAPTIONS = ("cut", "chunk")
MAX_CHUNKS = 8  # 600 tokens of CLIP


@dataclass(frozen=True)
class CaptionRules:
    """What happens to captions at each step.

    Attributes:
        dropout: probability of the empty caption, which classifier-free guidance needs (Ho & Salimans 2022).
        shuffle: put the parts between `separator` in another order.
        part_dropout: probability of each part to be left out.
        keep: so many first parts stay, and in their place.
        separator: between parts.
    """

    dropout: float = 0.1
    shuffle: bool = False
    part_dropout: float = 0.0
    keep: int = 0
    separator: str = ","

    def __post_init__(self) -> None:
        if not 0 <= self.dropout <= 1:
            raise UsageError(f"expected a caption dropout from 0 to 1, found {self.dropout}")
        if not 0 <= self.part_dropout < 1:
            raise UsageError(f"expected a dropout of parts from 0 to below 1, found {self.part_dropout}")
        if self.keep < 0 or not self.separator:
            raise UsageError("expected keep to be at least 0 and a separator that is not empty")

    @property
    def rearranges(self) -> bool:
        """Whether a caption is put together again at every step."""
        return self.shuffle or self.part_dropout > 0


def worded(captions: Sequence[str], prefix: str, suffix: str = "") -> tuple[str, ...]:
    """Captions between the words of their source, which an image without a caption has alone; commas touch what is before
    them."""
    if not prefix and not suffix:
        return tuple(captions)
    behind = suffix if suffix.startswith((",", ".", ";")) else f" {suffix}"
    return tuple((f"{prefix} {caption}".strip() + behind).strip() for caption in captions or ("",))


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
    return _rearranged(caption, rules, rng) if rules.rearranges else caption


def _rearranged(caption: str, rules: CaptionRules, rng: np.random.Generator) -> str:
    parts = [part.strip() for part in caption.split(rules.separator)]
    first, rest = parts[: rules.keep], parts[rules.keep :]
    order = rng.permutation(len(rest)) if rules.shuffle else range(len(rest))
    stays = rng.random(len(rest)) >= rules.part_dropout
    return f"{rules.separator} ".join([*first, *(rest[place] for place in order if stays[place])])


def lost_words(tokenizer: Any, caption: str, long: str = "cut", max_chunks: int = MAX_CHUNKS) -> str:
    """The end of a caption that the text encoder does not get to see, "" if it sees all."""
    if long == "cut":
        return dropped_text(tokenizer, caption)
    lost = chunks_by_commas(tokenizer, [[Run(caption)]])[max_chunks:]
    return tokenizer.decode([token for chunk in lost for token in chunk.ids]).strip()


def token_chunks(
    tokenizer: Any, captions: Sequence[str], long: str = "cut", max_chunks: int = MAX_CHUNKS
) -> np.ndarray:
    """Token ids of captions, (N, K, L) int64, each chunk with its start and end mark and padded to L.

    With `long="cut"` K is 1. With "chunk" a caption that is too long goes on in further chunks, where generation would
    cut a prompt of the same words; K is what the longest caption needs, at most `max_chunks`, and others are filled up
    with empty chunks. The text encoder encodes each chunk alone and the embeddings are joined along the sequence, (N, K
    * L, C). What looks like the grammar of prompts is letters here.

    Args:
        tokenizer: a `Tokenizer`, or one of transformers; its `model_max_length` is L.
    """
    if long not in LONG_CAPTIONS:
        raise UsageError(f"expected long captions to be one of {', '.join(LONG_CAPTIONS)}, found {long!r}")
    chunked = cut if long == "cut" else chunks_by_commas
    rows = [chunked(tokenizer, [[Run(caption)]])[:max_chunks] for caption in captions]
    count = max(len(row) for row in rows)
    filled = [row + [Chunk()] * (count - len(row)) for row in rows]
    return np.array([[chunk.framed(tokenizer)[0] for chunk in row] for row in filled], np.int64)
