"""PEFT's configuration of an adapter: it lies beside the weights, or in their metadata, and holds what they do not."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from latentdiff.adapters.lora.kinds import Facts
from latentdiff.checkpoints.files import TensorFile
from latentdiff.errors import CheckpointError
from latentdiff.reading.json import parse_object
from latentdiff.reading.plain import read_text

_WRAPPER = "base_model.model."
# Patterns come with files of anybody, and are none of the regular expressions that PEFT takes them for: names of which
# ".*" stands for any part. Some regular expressions would take for ever.
_PATTERN = re.compile(r"\^?[\w.]+(?:\.\*[\w.]+){0,8}\$?")
_LONGEST_PATTERN = 300


@dataclass(frozen=True)
class PEFTConfig:
    """Alphas and ranks by layer; empty where a file has no configuration.

    Args:
        path: of the file with the weights, for messages.
        entries: as stored. diffusers puts those of all parts together, each with the part before its name.
    """

    path: Path
    entries: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, file: TensorFile) -> PEFTConfig:
        """That of a file: in the metadata (diffusers), or in a file beside the weights (PEFT).

        Raises:
            CheckpointError: it is damaged.
        """
        beside = file.path.with_name("adapter_config.json")
        if "lora_adapter_metadata" in file.metadata:
            text = file.metadata["lora_adapter_metadata"]
        elif file.path.stem == "adapter_model" and beside.exists():
            text = read_text(beside)
        else:
            return cls(file.path)
        entries = parse_object(text, f"the PEFT configuration of {file.path}", remedy="save it again")
        return cls(file.path, entries)

    def facts(self, layer: str, rank: int | None) -> Facts:
        """What it says of a layer, under the file's own name for it, whose matrices have this rank.

        Raises:
            CheckpointError: a value makes no sense.
        """
        part = layer.partition(".")[0] + "."
        prefix = part if part + "lora_alpha" in self.entries or part + "alpha" in self.entries else ""
        options = {key.removeprefix(prefix): value for key, value in self.entries.items() if key.startswith(prefix)}
        path = layer.removeprefix(prefix).removeprefix(_WRAPPER)
        stated = "lora_alpha" if "lora_alpha" in options else "alpha"
        alpha = self._number(options.get(stated), options.get("alpha_pattern"), path, "alpha")
        width = self._number(options.get("r"), options.get("rank_pattern"), path, "rank")
        if alpha is not None and options.get("use_rslora") and rank:
            alpha *= rank**0.5
        return Facts(alpha, int(width) if width else None, options)

    def _number(self, value: Any, patterns: Any, path: str, what: str) -> float | None:
        """The value for one layer; the last pattern that fits its name decides."""
        if not isinstance(patterns, Mapping | None):
            raise self._senseless(f"{what}_pattern", patterns)
        for pattern, other in (patterns or {}).items():
            if self._fits(pattern, path):
                value = other
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < float("inf"):
            raise self._senseless(what, value)
        return float(value)

    def _fits(self, pattern: str, path: str) -> bool:
        """PEFT's own rule: the pattern is the end of the name, from a dot on."""
        pattern = pattern.replace("\\.", ".")
        if len(pattern) > _LONGEST_PATTERN or not _PATTERN.fullmatch(pattern):
            raise self._senseless("pattern", pattern)
        first, *others = pattern.strip("^$").split(".*")
        starts = [0] if pattern.startswith("^") else [0, *(place + 1 for place, c in enumerate(path) if c == ".")]
        return any(_follow(path, start, [first, *others]) for start in starts)

    def _senseless(self, what: str, found: Any) -> CheckpointError:
        shown = repr(found)[:60]
        return CheckpointError(
            f"{self.path} comes with a PEFT configuration that cannot be used: expected a sensible {what}, found "
            f"{shown}; save it again"
        )


def _follow(path: str, place: int, parts: list[str]) -> bool:
    """Whether the name goes on from `place` with these parts, whatever is between them, and ends with the last."""
    first, *others = parts
    if not path.startswith(first, place):
        return False
    place += len(first)
    if not others:
        return place == len(path)
    for part in others[:-1]:
        if (found := path.find(part, place)) < 0:
            return False
        place = found + len(part)
    return path.endswith(others[-1]) and len(path) - len(others[-1]) >= place
