"""Prompts as lists of text, and the words of a plain one for which the model has no room."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from latentdiff.errors import UsageError
from latentdiff.prompts.tokenizer import END_OF_WORD


def dropped_text(tokenizer: Any, prompt: str) -> str:
    """The end of the prompt that the model does not read, from the first cut word on; "" if it reads all."""
    room = tokenizer.model_max_length - 1  # the end mark takes the last place
    encoded = tokenizer(prompt, truncation=False, return_offsets_mapping=tokenizer.is_fast, verbose=False)
    if len(encoded["input_ids"]) <= room + 1:
        return ""
    tokens = tokenizer.convert_ids_to_tokens(encoded["input_ids"])
    first = room
    while first > 1 and not tokens[first - 1].endswith(END_OF_WORD):
        first -= 1
    if tokenizer.is_fast:
        return prompt[encoded["offset_mapping"][first][0] :].strip()
    return tokenizer.decode(encoded["input_ids"][first:-1]).strip()  # transformers 4 may have no offsets


def as_list(prompt: str | Sequence[str]) -> list[str]:
    """One prompt or several as a list of text.

    Raises:
        UsageError: there is no prompt, or one is not valid text.
    """
    if not isinstance(prompt, Iterable):
        raise UsageError(f"expected a prompt or a list of prompts, found {type(prompt).__name__}: {prompt!r}")
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    if not prompts:
        raise UsageError("expected a prompt or a list of prompts, found an empty list")
    for text in prompts:
        if not isinstance(text, str):
            raise UsageError(f"expected prompts as text, found {type(text).__name__}: {text!r}")
        if not text.isascii() and text != text.encode(errors="replace").decode():
            raise UsageError(f"expected prompts in valid Unicode, found {text!r}")
    return prompts
