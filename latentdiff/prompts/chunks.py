"""Tokens in chunks: what a text encoder reads at once, which is 75 tokens for CLIP, without the marks.

Each chunk is encoded alone, and the embeddings are joined along the sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from latentdiff.prompts.tokenizer import END_OF_WORD
from latentdiff.prompts.weights import Run, Stretch

COMMA_REACH = 20  # so far back a comma may lie behind which a full chunk is cut (AUTOMATIC1111's default)
WHOLE_WORD = 8  # words of fewer tokens are not cut (ComfyUI)


@dataclass
class Chunk:
    """Tokens without start mark, end mark and padding, and the weight of each."""

    ids: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def is_weighted(self) -> bool:
        return any(weight != 1.0 for weight in self.weights)

    def add(self, ids: Sequence[int], weight: float) -> None:
        """Append tokens of one weight."""
        self.ids += ids
        self.weights += [weight] * len(ids)

    def framed(self, tokenizer: Any) -> tuple[list[int], list[float]]:
        """Ids and weights with the marks and the padding, each as long as the tokenizer's `model_max_length`."""
        ids = [tokenizer.bos_token_id, *self.ids, tokenizer.eos_token_id]
        missing = tokenizer.model_max_length - len(ids)
        return ids + [tokenizer.pad_token_id] * missing, [1.0, *self.weights, *[1.0] * (missing + 1)]


def room(tokenizer: Any) -> int:
    """How many tokens a chunk holds besides its marks."""
    return tokenizer.model_max_length - 2


def chunks_by_commas(tokenizer: Any, stretches: Sequence[Stretch]) -> list[Chunk]:
    """Chunks as AUTOMATIC1111 makes them: a `BREAK` ends one; what follows a full one's last comma moves on with the
    rest, if that comma lies at most `COMMA_REACH` tokens back. The vectors of a learned word stay together."""
    size, comma = room(tokenizer), tokenizer.convert_tokens_to_ids("," + END_OF_WORD)
    done: list[Chunk] = []
    for place, stretch in enumerate(stretches):
        chunk, last_comma = Chunk(), -1
        for group, weight in _groups(tokenizer, stretch):
            if group == [comma]:
                last_comma = len(chunk)
            elif len(chunk) == size and last_comma >= 0 and size - last_comma <= COMMA_REACH:
                moved = Chunk(chunk.ids[last_comma + 1 :], chunk.weights[last_comma + 1 :])
                done.append(Chunk(chunk.ids[: last_comma + 1], chunk.weights[: last_comma + 1]))
                chunk, last_comma = moved, -1
            if len(chunk) + len(group) > size:
                done.append(chunk)
                chunk, last_comma = Chunk(), -1
            chunk.add(group[:size], weight)
        if len(chunk) or place < len(stretches) - 1 or not done:
            done.append(chunk)
    return done


def chunks_by_words(tokenizer: Any, stretches: Sequence[Stretch]) -> list[Chunk]:
    """Chunks as ComfyUI makes them: a word of fewer than `WHOLE_WORD` tokens is not cut; there are no breaks."""
    size, done, chunk = room(tokenizer), [], Chunk()
    for run in (run for stretch in stretches for run in stretch):
        for word in run.text.replace("\n", " ").split(" "):
            ids = [token for group in _expanded(tokenizer, word) for token in group]
            while len(chunk) + len(ids) > size:
                fits = size - len(chunk) if len(ids) >= WHOLE_WORD or not len(chunk) else 0
                chunk.add(ids[:fits], run.weight)
                done.append(chunk)
                ids, chunk = ids[fits:], Chunk()
            chunk.add(ids, run.weight)
    return [*done, chunk]


def cut(tokenizer: Any, stretches: Sequence[Stretch]) -> list[Chunk]:
    """The first chunk alone; what does not fit is lost."""
    chunk = Chunk()
    for group, weight in _groups(tokenizer, (run for stretch in stretches for run in stretch)):
        chunk.add(group, weight)
    size = room(tokenizer)
    return [Chunk(chunk.ids[:size], chunk.weights[:size])]


CHUNKING: dict[str, Callable[[Any, Sequence[Stretch]], list[Chunk]]] = {
    "a1111": chunks_by_commas,
    "comfy": chunks_by_words,
    "plain": cut,
}


def _groups(tokenizer: Any, runs: Iterable[Run]) -> Iterable[tuple[list[int], float]]:
    """What must not be torn apart, with its weight: single tokens, and all vectors of a learned word."""
    for run in runs:
        for group in _expanded(tokenizer, run.text):
            yield group, run.weight


def _expanded(tokenizer: Any, text: str) -> list[list[int]]:
    expansions = getattr(tokenizer, "expansions", {})
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return [list(expansions.get(token, (token,))) for token in ids]
