"""Names of original single files as their authors meant them: without what wrappers put before them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TypeVar

from latentdiff.checkpoints.families import ALL_PREFIXES, SD

Value = TypeVar("Value")

_WRAPPERS = ("module.", "_orig_mod.", "state_dict.")  # of everything in a file: data parallel, compiled, nested
_STARTS = "|".join(re.escape(prefix) for prefix in (*ALL_PREFIXES, "model_ema."))
# "model.first_stage_model." and the like: Lightning modules that hold another one.
_NESTED = re.compile(rf"(?:(?:model|module|_orig_mod)\.)+({_STARTS})")
_TEXT = SD.prefixes["text_encoder"]


def unwrapped(tensors: Mapping[str, Value]) -> dict[str, Value]:
    """The same by usual names: without wrappers' prefixes, the text encoder's level `transformer.text_model` put back.

    A name that would then stand for two tensors stays as it is.
    """
    usual: dict[str, Value] = dict(tensors)
    for wrapper in _WRAPPERS:
        while usual and all(name.startswith(wrapper) for name in usual):
            usual = {name.removeprefix(wrapper): value for name, value in usual.items()}
    outer = {name[: match.start(1)] for name in usual if not _is_plain(name) and (match := _NESTED.match(name))}
    inner = {name: _without(outer, name) for name in usual}
    usual = {name if plain != name and plain in usual else plain: usual[name] for name, plain in inner.items()}
    lacks_level = f"{_TEXT}transformer.embeddings.token_embedding.weight" in {_plain(name) for name in usual}
    renamed: dict[str, Value] = {}
    for name, value in usual.items():
        plain = _plain(name)
        if lacks_level and plain.startswith(f"{_TEXT}transformer."):
            plain = f"{_TEXT}transformer.text_model.{plain.removeprefix(f'{_TEXT}transformer.')}"
        renamed[name if plain != name and (plain in usual or plain in renamed) else plain] = value
    return renamed


def _is_plain(name: str) -> bool:
    return name.startswith(ALL_PREFIXES)


def _without(outer: set[str], name: str) -> str:
    """The name without one of the prefixes that are around parts in the same file."""
    return next((name.removeprefix(one) for one in outer if name.startswith(one) and not _is_plain(name)), name)


def _plain(name: str) -> str:
    """With the level that transformers' encoder has in the original code, where only its wrapper was saved."""
    return f"{_TEXT}transformer.{name.removeprefix(_TEXT)}" if name.startswith(f"{_TEXT}text_model.") else name
