"""Renaming between two layouts of one model: invertible tables, and a strict report of what did not fit.

A table holds pairs of name prefixes, whole dotted parts each: ("mid_block.resnets.0.norm1",
"middle_block.0.in_layers.0"). The longest prefix that fits a name decides, in both directions, so that the
inverse of a table is the table read from right to left.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from latentdiff.errors import CheckpointError

Shape = tuple[int, ...]
_SHOWN = 5  # offending names in an error message


class KeyMap:
    """A two-way table of name prefixes: `ours` are those of the diffusers layout, `theirs` of a foreign one.

    Raises:
        ValueError: a prefix occurs twice on one side, so that the table has no inverse.
    """

    def __init__(self, pairs: Iterable[tuple[str, str]]) -> None:
        self.pairs = tuple(pairs)
        self._to_theirs = dict(self.pairs)
        self._to_ours = {theirs: ours for ours, theirs in self.pairs}
        if not len(self.pairs) == len(self._to_theirs) == len(self._to_ours):
            raise ValueError("a key map needs every prefix once on either side")

    def to_theirs(self, name: str) -> str | None:
        """The foreign name of one of ours; None where the table has no place for it."""
        return _rename(name, self._to_theirs)

    def to_ours(self, name: str) -> str | None:
        """Our name of a foreign one; None where the table has no place for it."""
        return _rename(name, self._to_ours)


def expand(ours: str, theirs: str, table: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Pairs for one block at `ours` and `theirs` whose inner names differ as `table` says."""
    for inner_ours, inner_theirs in table.items():
        yield f"{ours}.{inner_ours}", f"{theirs}.{inner_theirs}"


def _rename(name: str, table: Mapping[str, str]) -> str | None:
    head, tail = name, ""
    while head not in table:
        head, dot, last = head.rpartition(".")
        if not dot:
            return None
        tail = f".{last}{tail}"
    return table[head] + tail


@dataclass(frozen=True)
class KeyReport:
    """How the tensors that were found fit those that were expected; `dropped` were left out on purpose."""

    part: str
    missing: Mapping[str, Shape]
    unexpected: Mapping[str, Shape]
    wrong_shape: Mapping[str, tuple[Shape, Shape]]  # name -> (expected, found)
    dropped: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        """Nothing is missing, nothing is left over, every shape is right."""
        return not (self.missing or self.unexpected or self.wrong_shape)

    def raise_unless_fits(self, source: object) -> None:
        """Fail with the first offending names and shapes, and a guess why they are wrong.

        Raises:
            CheckpointError: something is missing, unexpected or of the wrong shape.
        """
        if self.fits:
            return
        faults = [
            *_fault("missing", [f"{name} {_show(shape)}" for name, shape in self.missing.items()]),
            *_fault("unexpected", [f"{name} {_show(shape)}" for name, shape in self.unexpected.items()]),
            *_fault(
                "of the wrong shape",
                [
                    f"{name} (expected {_show(expected)}, found {_show(found)})"
                    for name, (expected, found) in self.wrong_shape.items()
                ],
            ),
        ]
        raise CheckpointError(f"{self.part} of {source} does not fit: {'; '.join(faults)}. {self._guess()}")

    def _guess(self) -> str:
        if self.wrong_shape and not self.missing and not self.unexpected:
            return "Probably the configuration belongs to a model of another size or family"
        if self.missing and not self.unexpected and not self.wrong_shape:
            return "Probably the file is incomplete or was saved from a part of the model"
        if self.unexpected and not self.missing and not self.wrong_shape:
            return "Probably the model was extended (an adapter, extra layers) after the configuration was written"
        return "Probably these are the weights of another architecture"


def check_floats(part: str, source: object, tensors: Mapping[str, Tensor]) -> None:
    """Make sure that all weights are floating point numbers.

    Raises:
        CheckpointError: some are not; the message names the first.
    """
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise CheckpointError(f"the {part} in {source} holds {tensor.dtype} weights ({name}), expected floats")


def compare(
    part: str, expected: Mapping[str, Shape], found: Mapping[str, Shape], dropped: Iterable[str] = ()
) -> KeyReport:
    """Compare names and shapes, exactly."""
    return KeyReport(
        part,
        missing={name: shape for name, shape in expected.items() if name not in found},
        unexpected={name: shape for name, shape in found.items() if name not in expected},
        wrong_shape={
            name: (shape, found[name]) for name, shape in expected.items() if name in found and found[name] != shape
        },
        dropped=tuple(dropped),
    )


def _fault(what: str, entries: list[str]) -> list[str]:
    if not entries:
        return []
    more = f" and {len(entries) - _SHOWN} more" if len(entries) > _SHOWN else ""
    return [f"{len(entries)} {what}: {', '.join(entries[:_SHOWN])}{more}"]


def _show(shape: Shape) -> str:
    return "x".join(map(str, shape)) or "scalar"
