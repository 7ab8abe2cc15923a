"""The account of a prompt: what is read from it, token by token, and what is not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from latentdiff.prompts.notice import shortened
from latentdiff.prompts.syntax import Chunk, Prompt, chunks_of, dropped_text, read_prompt, room
from latentdiff.prompts.tokenizer import END_OF_WORD


@dataclass(frozen=True)
class WeighedTokens:
    """Neighbouring tokens of one weight, as the vocabulary spells them; those that end a word are followed by a space."""

    text: str
    count: int
    weight: float


@dataclass(frozen=True)
class StageAccount:
    """What one part of a prompt says from a step to a later one, both included and counted from 1."""

    first: int
    last: int
    chunks: tuple[tuple[WeighedTokens, ...], ...]

    @property
    def count(self) -> int:
        """Tokens in all chunks, without marks and padding."""
        return sum(tokens.count for chunk in self.chunks for tokens in chunk)


@dataclass(frozen=True)
class PromptAccount:
    """What a prompt means to a model; `str` makes a table of it.

    Attributes:
        prompt: with its outer grammar read: parts, LoRAs, and what has no meaning.
        stages: of each part.
        room: tokens in a chunk.
        cut: the end that the model does not read, "" if it reads all.
    """

    prompt: Prompt
    stages: tuple[tuple[StageAccount, ...], ...]
    room: int
    cut: str

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        parts = len(self.prompt.parts)
        for number, (part, stages) in enumerate(zip(self.prompt.parts, self.stages, strict=True), 1):
            if parts > 1 or part.weight != 1.0:
                yield f"part {number} of {parts}, weight {part.weight:g}"
            for stage in stages:
                when = f"steps {stage.first} to {stage.last}: " if len(stages) > 1 else ""
                chunks = len(stage.chunks)
                yield f"{when}{stage.count} tokens in {chunks} chunk{'s' * (chunks > 1)} of {self.room}"
                yield "  chunk  tokens  weight  text"
                for place, chunk in enumerate(stage.chunks, 1):
                    for tokens in chunk or (WeighedTokens("(empty)", 0, 1.0),):
                        yield f"  {place:>5}  {tokens.count:>6}  {tokens.weight:>6.4g}  {tokens.text}"
        for tag in self.prompt.loras:
            yield f"LoRA {tag.name}: strength {tag.text_scale:g} in the text encoder, {tag.unet_scale:g} in the U-Net"
        for text in dict.fromkeys(self.prompt.unheeded):
            yield f"has no meaning in the syntax {self.prompt.syntax}: {shortened(text)}"
        if self.cut:
            yield f"cut, the model does not read it: {shortened(self.cut)}"


def account(tokenizer: Any, text: str, syntax: str, steps: int, *, negative: bool = False) -> PromptAccount:
    """What a prompt means over `steps` steps.

    Raises:
        UsageError: the prompt cannot be read; see `read_prompt`.
    """
    prompt = read_prompt(text, syntax, negative=negative)
    stages = []
    for part in prompt.parts:
        found, first = [], 1
        for stage in prompt.stages(part, steps):
            chunks = chunks_of(tokenizer, stage.text, syntax)
            found.append(StageAccount(first, stage.last, tuple(_weighed(tokenizer, chunk) for chunk in chunks)))
            first = stage.last + 1
        stages.append(tuple(found))
    cut = dropped_text(tokenizer, text) if syntax == "plain" else ""
    return PromptAccount(prompt, tuple(stages), room(tokenizer), cut)


def _weighed(tokenizer: Any, chunk: Chunk) -> tuple[WeighedTokens, ...]:
    pairs = zip(tokenizer.convert_ids_to_tokens(chunk.ids), chunk.weights, strict=True)
    found = []
    for weight, some in groupby(pairs, key=lambda pair: pair[1]):
        tokens = [token for token, _ in some]
        text = "".join(token.removesuffix(END_OF_WORD) + " " * token.endswith(END_OF_WORD) for token in tokens)
        found.append(WeighedTokens(text.strip(), len(tokens), weight))
    return tuple(found)
