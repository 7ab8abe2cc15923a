"""A model in other processes: what a pickle holds."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from latentdiff.adapters.lora.offered import OfferedLoRAs
from latentdiff.errors import CheckpointError, UsageError
from latentdiff.model.memory.residence import Residence
from latentdiff.networks.device import Precision

Place = str | os.PathLike[str] | None


class PortableModel:
    """What lets another process have a model."""

    residence: Residence
    precision: Precision
    backend: Any
    model_hash: str
    offered: OfferedLoRAs
    adapted_by: list[tuple[str, tuple[Any, ...], str]]
    loaded_from: dict[str, Any] | None  # arguments of `load`; None if it was made of parts

    def __reduce__(self) -> tuple[Any, ...]:
        """For pickle and copy: whence it was loaded and how, in place of its weights, which are read again.

        Raises:
            UsageError: its weights are not those of a file.
        """
        if self.loaded_from is None or not all(part.is_as_stored for part in self.residence.parts.values()):
            raise UsageError(
                "a model can be pickled or copied if its weights are those that `load` finds, and these were made in "
                "memory or changed there; save it, and load that"
            )
        here = {"device": str(self.residence.device), "precision": self.precision.name, "backend": self.backend}
        known = self.model_hash, self.adaptations(), self.offered, self.adapted_by  # type: ignore[attr-defined]
        return _loaded_again, (type(self), {**self.loaded_from, **here}, *known)


def _loaded_again(
    kind: Any,
    arguments: Mapping[str, Any],
    model_hash: str,
    adaptations: list[dict[str, Any]],
    offered: OfferedLoRAs,
    calls: list[tuple[str, tuple[Any, ...], str]],
) -> Any:
    """The model that was pickled.

    Raises:
        CheckpointError: its files are not there any more, or others.
    """
    pipe = kind.load(**arguments)
    pipe.offered = offered
    for method, given, _ in calls:
        getattr(pipe, method)(*given, **({"allow_partial": True} if method == "load_lora" else {}))
    if (pipe.model_hash, pipe.adaptations()) != (model_hash, adaptations):
        raise CheckpointError(f"the files of {pipe.name or 'the model'} are others than when it was pickled")
    return pipe


def absolute(place: Place) -> Place:
    """A place that means the same from another folder; the id of a hub stays one."""
    return os.path.abspath(place) if place is not None and os.path.exists(place) else place
