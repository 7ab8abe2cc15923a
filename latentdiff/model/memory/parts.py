"""Networks whose weights are read from their file when they are first used, and can be given back to the system."""

from __future__ import annotations

import ctypes
import sys
import weakref
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from latentdiff.checkpoints.mapping import empty, fill, release


class Part:
    """One network of a model.

    Args:
        module: the network; on the meta device if its weights are still to be read.
        stored: its weights as they lie in their file, mapped, by name; None if they are in `module` and nowhere else.
    """

    def __init__(self, module: nn.Module, stored: Mapping[str, Tensor] | None = None) -> None:
        self.module = module.eval()  # may have no weights at the moment: for its configuration, `ready` for use
        self._stored = stored
        self._device = torch.device("cpu")
        self._read: dict[str, _Trace] = {}  # what was read
        self.is_ready = stored is None  # whether it has its weights

    @property
    def device(self) -> torch.device:
        """Where its weights lie, or will lie."""
        device = next(self.module.parameters()).device
        return self._device if device.type == "meta" else device

    def ready(self) -> nn.Module:
        """The network with its weights."""
        if not self.is_ready:
            self._load(self._stored)
        return self.module

    def weights(self) -> Mapping[str, Tensor]:
        """Its weights by name, wherever they lie now."""
        return self.module.state_dict() if self._stored is None else self._stored

    def give_back(self) -> bool:
        """Give the memory of the weights back; the next `ready` reads them again.

        Returns:
            False where they must stay because they are not those of a file: trained, merged, or made in memory.
        """
        if not self.is_ready:
            return True
        if not self.is_as_stored:
            return False
        empty(self.module, self._stored)
        self._read, self.is_ready = {}, False
        for tensor in self._stored.values():
            release(tensor)
        trim()
        return True

    @property
    def is_as_stored(self) -> bool:
        """Whether the weights are those of the file still."""
        if self._stored is None or not self.is_ready:
            return self._stored is not None
        present = self.module.state_dict(keep_vars=True)
        return all(trace.is_of(present[name]) for name, trace in self._read.items())

    def to(self, device: torch.device | str, dtype: torch.dtype) -> None:
        """Move to a device and a number format; where the file can be read again, the weights are taken from there."""
        device = torch.device(device)
        if self.device == device and all(parameter.dtype == dtype for parameter in self.module.parameters()):
            return
        if self.give_back():
            self.module.to(dtype)
            self._device = device
        else:
            self.module.to(device, dtype)

    def _load(self, stored: Mapping[str, Tensor]) -> None:
        with torch.inference_mode(False):
            fill(self.module, stored, self._device)
        present = self.module.state_dict(keep_vars=True)
        self._read = {name: _Trace.of(present[name]) for name in stored}
        self.is_ready = True


@dataclass(frozen=True)
class _Trace:
    """By what a tensor is known again, if nobody has put another in its place or written to it."""

    tensor: weakref.ref[Tensor]
    version: int
    address: int

    @classmethod
    def of(cls, tensor: Tensor) -> _Trace:
        return cls(weakref.ref(tensor), tensor._version, tensor.data_ptr())

    def is_of(self, tensor: Tensor) -> bool:
        return self.tensor() is tensor and (tensor._version, tensor.data_ptr()) == (self.version, self.address)


def trim() -> None:
    """Give memory that was freed, but that the C library still holds, back to the system."""
    if sys.platform == "linux":
        library = ctypes.CDLL(None)
        if hasattr(library, "malloc_trim"):  # glibc only
            library.malloc_trim(0)
