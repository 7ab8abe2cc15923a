"""The options of a walk as they are when all is decided; and what is asked of several images, with one entry for each."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from copy import copy
from itertools import groupby
from typing import TYPE_CHECKING, Any, ClassVar, Self, Unpack

from latentdiff.errors import UsageError
from latentdiff.prompts.syntax import as_list, read_prompt
from latentdiff.request.options import OPTIONS, SAMPLING, SamplingOptions

if TYPE_CHECKING:

    class Settings:
        """All of `SamplingOptions`, checked, with the defaults in place of what was not given."""

        __dataclass_fields__: ClassVar[dict[str, Any]]
        left_open: set[str]
        given: dict[str, Any]

        def __init__(self, **options: Unpack[SamplingOptions]) -> None: ...
        def but(self, **changes: Any) -> Self: ...
        def decided(self, changes: Mapping[str, Any]) -> Self: ...
        def __getattr__(self, name: str) -> Any: ...

else:
    from dataclasses import field, make_dataclass

    from latentdiff.request.options import FAST, checked

    class _Settled:
        """All of `SamplingOptions`, checked, with the defaults in place of what was not given, or those of `fast`.

        `given` are those that were given, `left_open` the names of those that a default decided.
        """

        def __post_init__(self) -> None:
            given = _not_none(self)
            self._settle(checked(given) if given else given)

        def _settle(self, given: dict[str, Any]) -> None:
            fast = FAST if given.get("fast") else {}
            defaults = {name: option.default for name, option in SAMPLING.items()}
            left_open = SAMPLING.keys() - given.keys() - fast.keys()
            for name, value in {**defaults, **fast, **given, "left_open": left_open, "given": given}.items():
                object.__setattr__(self, name, value)

        def but(self, **changes: Any) -> Self:
            """The same with these options given, and what was left open left open."""
            return type(self)(**{**self.given, **changes})

        def decided(self, changes: Mapping[str, Any]) -> Self:
            """The same with these values, which are not checked again, and nothing left open that has a default."""
            other = copy(self)
            other._settle(_not_none(self) | {name: value for name, value in changes.items() if value is not None})
            return other

    def _not_none(settings: _Settled) -> dict[str, Any]:
        values = ((name, getattr(settings, name)) for name in SAMPLING)
        return {name: value for name, value in values if value is not None}

    Settings = make_dataclass(
        "Settings",
        [(name, Any, field(default=None)) for name in SAMPLING],
        bases=(_Settled,),
        frozen=True,
        kw_only=True,
    )


def one_per_image(
    prompt: str | Sequence[str], negative_prompt: str | Sequence[str], num_images: int
) -> tuple[list[str], list[str]]:
    """Prompts and negative prompts, one of each per image, all images of a prompt in a row.

    Raises:
        UsageError: there is no prompt, or the two do not pair up.
    """
    prompts, negatives = as_list(prompt), as_list(negative_prompt)
    if len(negatives) == 1:
        negatives = negatives * len(prompts)
    if len(negatives) != len(prompts):
        raise UsageError(f"expected one negative prompt or {len(prompts)}, one for each prompt, found {len(negatives)}")
    repeated = range(num_images)
    return [text for text in prompts for _ in repeated], [text for text in negatives for _ in repeated]


def seed_of_each(seed: int | Sequence[int] | None, count: int) -> list[int]:
    """Seeds, one per image: image i has seed + i; a list is taken as it is, and None draws the first.

    Raises:
        UsageError: a list of another length.
    """
    if seed is None:
        seed = secrets.randbelow(2**32)
    if isinstance(seed, int):
        return [seed + i for i in range(count)]
    if len(seed) != count:
        raise UsageError(f"expected one seed or {count}, one for each image, found {len(seed)}")
    return list(seed)


def batches(count: int, batch_size: int | None) -> list[slice]:
    """Cut `count` images into parts of at most `batch_size`; None is the default."""
    size = OPTIONS["batch_size"].default if batch_size is None else batch_size
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def batches_of_equal_loras(prompts: Sequence[str], syntax: str, batch_size: int) -> list[slice]:
    """Batches whose prompts name the same LoRAs with the same strengths."""
    found: list[slice] = []
    for _, some in groupby(prompts, key=lambda text: read_prompt(text, syntax).loras):
        start = found[-1].stop if found else 0
        found += [slice(start + part.start, start + part.stop) for part in batches(len(list(some)), batch_size)]
    return found
