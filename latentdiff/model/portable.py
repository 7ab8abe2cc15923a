"""A model in threads and in other processes: who may use it, what a forked process may do, and what a pickle holds."""

from __future__ import annotations

import os
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from latentdiff.adapters.lora.offered import OfferedLoRAs
from latentdiff.device import Precision, apart_from_torch
from latentdiff.errors import CheckpointError, UsageError
from latentdiff.memory.residence import Residence
from latentdiff.memory.sharing import Sharing

Place = str | os.PathLike[str] | None


class PortableModel:
    """What lets threads and processes use a model.

    Threads draw at the same time on a resident model in float32; in all other modes one call waits for the other. What
    changes the model (`load_lora`, `to`, ...) waits for drawings and is waited for by them. So each image is the one
    that is made without other threads.
    """

    sharing: Sharing
    residence: Residence
    precision: Precision
    backend: Any
    model_hash: str
    offered: OfferedLoRAs
    adapted_by: list[tuple[str, tuple[Any, ...], str]]
    loaded_from: dict[str, Any] | None  # arguments of `load`; None if it was made of parts

    @contextmanager
    def in_use(self, *, alone: bool = False) -> Generator[None, None, None]:
        """Inside, no other thread changes the model; with `alone`, no other one uses it either. It may be nested.

        Raises:
            UsageError: this process was forked from the one that loaded the model, and has not what it needs.
        """
        if self.sharing.is_forked:
            self._check_fork()
        with self.sharing.entered(alone=alone), apart_from_torch(self.residence.device.type):
            yield

    @contextmanager
    def alone(self) -> Generator[None, None, None]:
        """Keep the model to this thread for several calls: `load_lora`, draw, `unload_lora`, say, which other threads
        then never see. Prompts that name LoRAs (`offer_loras`) need it not.
        """
        with self.in_use(alone=True):
            yield

    def _check_fork(self) -> None:
        threads = torch.get_num_threads()
        reasons = {
            "another thread was changing the model then": self.sharing.is_spoilt,
            "a model on a GPU does not come along": self.residence.device.type != "cpu",
            "the thread that streams its weights did not come along": self.residence.low_memory,
            f"the threads of the back end {self.backend} did not come along": self.backend != "torch",
            f"torch's {threads} threads did not come along; call torch.set_num_threads(1)": threads > 1,
        }
        if found := next((reason for reason, holds in reasons.items() if holds), None):
            raise UsageError(
                f"this process was forked from the one that loaded the model, and {found}; or load the model here, or "
                "start the process by spawn"
            )

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
