"""The networks of a model together: which of them are in memory, and whether an image will fit."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from latentdiff.errors import LatentDiffError, UsageError
from latentdiff.model.memory.estimate import (
    Weights,
    Workload,
    advice,
    available_memory,
    free_swap,
    held_bytes,
    in_gigabytes,
    needed,
    weight_bytes,
)
from latentdiff.model.memory.parts import Part
from latentdiff.model.memory.streaming import StreamedPart, block_bytes, has_blocks
from latentdiff.networks.device import Precision

NAMES = ("text_encoder", "unet", "vae")
SMALL = 2**28  # bytes of all weights, below which giving them back takes more time than it is worth
CLOSE = 0.9  # of what is free; estimates are not exact


class MemoryWarning(UserWarning):
    """An image may not fit into memory."""


class Residence:
    """The text encoder, the U-Net and the VAE of a model.

    Args:
        stored: the mapped weights of those that are on the meta device, by part and name.
        low_memory: stream the U-Net's weights, and keep no part longer than it is used.
        may_give_back: whether no other thread uses a part.

    Attributes:
        keep: True keeps every part once it was used, False gives each back as soon as another one is needed, None gives
            back only when memory is short. Weights that are not those of a file always stay.
        beside: networks that are used with the U-Net, by what they were made of, and as long as that is there.
    """

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        stored: Mapping[str, Mapping[str, Tensor]],
        *,
        low_memory: bool = False,
        may_give_back: Callable[[], bool] = lambda: True,
    ) -> None:
        self.parts = {name: Part(modules[name], stored.get(name)) for name in NAMES}
        if low_memory:
            self.parts["unet"] = StreamedPart(modules["unet"], stored["unet"])
        self.beside: WeakKeyDictionary[Any, Part] = WeakKeyDictionary()
        self.low_memory = low_memory
        self.keep: bool | None = False if low_memory else None
        self._device = torch.device("cpu")
        self._in_use: set[str] = set()
        self._may_give_back = may_give_back
        self._reading = threading.RLock()

    @property
    def device(self) -> torch.device:
        """Where the U-Net lies."""
        device = next(self.module("unet").parameters()).device
        return self._device if device.type == "meta" else device

    def adopt(self, key: Any, module: nn.Module, stored: Mapping[str, Tensor]) -> None:
        """Take a network on the meta device, with its weights, among those beside the U-Net."""
        self.beside[key] = (StreamedPart if self.low_memory and has_blocks(module) else Part)(module, stored)

    def ready(self, name: str) -> Any:
        """A part with its weights."""
        if self.parts[name].is_ready:
            return self.parts[name].module
        with self._reading, torch.inference_mode(False):  # weights that were read inside could not be used outside
            return self.parts[name].ready()

    @property
    def changes_in_use(self) -> bool:
        """Whether weights come and go while images are made, or may have to be repaired in float32."""
        if self.keep is False or not all(part.is_ready for part in self.parts.values()):
            return True
        return any(next(part.module.parameters()).dtype != torch.float32 for part in self.parts.values())

    def module(self, name: str) -> Any:
        """A part as it is now, perhaps without weights: for its configuration."""
        return self.parts[name].module

    def to(self, device: torch.device | str, precision: Precision) -> None:
        """Move all parts."""
        self._device = torch.device(device)
        for name, part in self.parts.items():
            part.to(device, getattr(precision, name))

    def expect_no_more(self) -> None:
        """Say that the next image is the last one: no part has to be kept for another, if the model is not small."""
        if self.keep is None and sum(weight_bytes(part.module) for part in self.parts.values()) > SMALL:
            self.keep = False

    def require_whole(self, what: str) -> None:
        """Raise a UsageError if `what`, which needs all weights in memory, cannot have them."""
        if self.low_memory:
            raise UsageError(
                f"{what} needs all weights in memory, and low_memory streams those of the U-Net; load without it"
            )

    def workload(
        self,
        rows: int,
        height: int,
        width: int,
        *,
        quadratic: bool = False,
        beside: Sequence[Part] = (),
        before: Sequence[Part] = (),
        window: int | None = None,
        tile: int | None = None,
    ) -> Workload:
        """What it takes to make images of latents of this size; see `Workload`.

        Args:
            beside: networks that are used with the U-Net.
            before: those that are used before it, one at a time.
        """
        size = block_bytes if self.low_memory else weight_bytes
        unet, vae = self.module("unet"), self.module("vae")
        return Workload(
            unet=unet.config,
            vae=vae.config,
            weights=self._weights(streamed=self.low_memory),
            rows=rows,
            height=height,
            width=width,
            unet_bytes=next(unet.parameters()).element_size(),
            vae_bytes=next(vae.parameters()).element_size(),
            quadratic=quadratic,
            low_memory=self.low_memory,
            window=window,
            tile=tile,
            beside=sum(size(part.module) for part in beside),
            before=max((weight_bytes(part.module) for part in before), default=0),
        )

    def check(self, workload: Workload) -> None:
        """Raise a LatentDiffError if a workload does not fit into the memory that is free now; warn where it is close, or
        swaps."""
        free = self._free()
        if free is None or (need := needed(workload, at_once=self.keep is True)) <= CLOSE * free:
            return
        found = (
            f"about {in_gigabytes(need)} of memory for the model and this image, and {in_gigabytes(free)} are free"
        )
        workload = workload.changed(weights=self._weights(streamed=True))
        options = " or ".join(filter(None, [advice(workload, free), "a smaller --width and --height"]))
        if need > free + free_swap(self.device):
            raise LatentDiffError(f"not enough memory: it takes {found}; try {options}")
        warnings.warn(f"it takes {found}; if it fails or is slow, try {options}", MemoryWarning, stacklevel=2)

    def make_room(self, name: str, need: int) -> None:
        """Give the other parts' memory back, if they are to be kept no longer than they are used, or memory is short.

        Args:
            name: of the part that is used next.
            need: bytes that it will take, beside its weights.
        """
        if self.keep is None:
            part = self.parts[name]
            need += 0 if part.is_ready else weight_bytes(part.module)
            available = available_memory(self.device)
            if available is None or need <= CLOSE * available:
                return
        if not self.keep and self._may_give_back():
            for other, part in self.parts.items():
                if other != name and other not in self._in_use:
                    part.give_back()
            if "unet" not in {name, *self._in_use}:
                for part in self.beside.values():
                    part.give_back()

    @contextmanager
    def using(self, name: str) -> Iterator[None]:
        """Keep a part whatever else is used inside the `with`: a callback of the loop may decode."""
        self._in_use.add(name)
        try:
            yield
        finally:
            self._in_use.discard(name)

    def _weights(self, *, streamed: bool) -> Weights:
        return Weights.of(*(self.module(name) for name in NAMES), streamed=streamed)

    def _free(self) -> int | None:
        """Bytes for the model and its work: what is free, and what the parts that are loaded have taken already."""
        available = available_memory(self.device)
        parts = (*self.parts.values(), *self.beside.values())
        loaded = sum(held_bytes(part.module) for part in parts)
        return None if available is None else available + loaded
