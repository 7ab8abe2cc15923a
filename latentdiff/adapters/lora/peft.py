"""PEFT's configuration of an adapter: it lies beside the weights, or in their metadata, and holds what they do not."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from latentdiff.adapters.lora.kinds import Facts
from latentdiff.checkpoints.files import TensorFile
from latentdiff.errors import CheckpointError

_WRAPPER = "base_model.model."
# Patterns come with files of anybody: regular expressions of which some would take for ever.
_LONGEST_PATTERN = 300
_MOST_REPEATS = 3
_REPEATED_GROUP = re.compile(r"\)\s*[*+{?]")
_REPEAT = re.compile(r"[*+{]")


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
            text = beside.read_text(encoding="utf-8", errors="replace")
        else:
            return cls(file.path)
        try:
            entries = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise CheckpointError(
                f"{file.path} comes with a PEFT configuration that is no JSON ({error}); save it again"
            ) from error
        if not isinstance(entries, dict):
            raise CheckpointError(f"{file.path} comes with a PEFT configuration that is no dictionary; save it again")
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
        if re.fullmatch(r"[\w.]+", pattern):  # nearly all are plain names; the dots may stand for anything, and do not
            return path == pattern or path.endswith(f".{pattern}")
        if (
            len(pattern) > _LONGEST_PATTERN
            or _REPEATED_GROUP.search(pattern)
            or len(_REPEAT.findall(pattern)) > _MOST_REPEATS
        ):
            raise self._senseless("pattern", pattern)
        try:
            return re.match(rf"(.*\.)?({pattern})$", path) is not None
        except re.error as error:
            raise self._senseless("pattern", pattern) from error

    def _senseless(self, what: str, found: Any) -> CheckpointError:
        shown = repr(found)[:60]
        return CheckpointError(
            f"{self.path} comes with a PEFT configuration that cannot be used: expected a sensible {what}, found "
            f"{shown}; save it again"
        )
