"""The LoRAs that a pipeline has loaded: several at once, each with its own scale, each removable without a trace."""

from __future__ import annotations

import os
from collections import OrderedDict
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from latentdiff.adapters.lora.strength import Strength
from latentdiff.checkpoints.hashing import file_hash
from latentdiff.errors import UsageError
from latentdiff.networks.device import Precision
from latentdiff.networks.text_encoder import TextEncoder
from latentdiff.networks.text_encoders import TextEncoders
from latentdiff.networks.unet import UNet

if TYPE_CHECKING:
    from latentdiff.adapters.lora.adapter import LoRA
    from latentdiff.adapters.lora.loading import LoadReport
    from latentdiff.adapters.lora.reading import LoRAFile

Stamp = tuple[int, int, int]  # what tells that a file is another: its node, bytes, time of the last change in nanoseconds


@dataclass(frozen=True, eq=False)
class _Kept:
    file: LoRAFile
    lora: LoRA
    report: LoadReport
    sha256: str
    stamp: Stamp | None


@dataclass(frozen=True)
class _Entry:
    kept: _Kept
    scale: Strength
    taps: ExitStack


def _stamp(path: Path) -> Stamp | None:
    """What changes with a file; None where there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


class LoadedLoRAs:
    """LoRAs attached to one model, by name, in the order of loading.

    Args:
        unet, text_encoder: the model. Its weights are never touched.

    Attributes:
        keep: how many that were unloaded stay in memory, the least recently used one goes first; for programs that
            attach the same ones again and again.
    """

    def __init__(self, unet: UNet, text_encoder: TextEncoder | TextEncoders) -> None:
        self._unet, self._text_encoder = unet, text_encoder
        self._entries: dict[str, _Entry] = {}
        self.keep = 0
        self._kept: OrderedDict[str, _Kept] = OrderedDict()

    def __contains__(self, name: str | None) -> bool:
        return name in self._entries

    def read(self, path: str | os.PathLike[str]) -> LoRAFile:
        """The file, or what is kept of it as long as it is the same; for `load`.

        Raises:
            CheckpointError: nothing is there, it is damaged, or it is no adapter.
        """
        from latentdiff.adapters.lora.reading import read_lora

        kept = self._kept.get(os.fspath(path))
        if kept is not None and kept.stamp == _stamp(kept.report.path):
            return kept.file
        return read_lora(path)

    def load(
        self,
        file: LoRAFile,
        scale: float | str | Strength,
        name: str,
        *,
        allow_partial: bool,
        precision: Precision,
    ) -> LoadReport:
        """Attach the adapter of a file; see `Pipeline.load_lora`."""
        from latentdiff.adapters.lora.loading import load_lora

        strength = Strength.of(scale)
        strength.check(self._unet.config)
        if name in self._entries:
            raise UsageError(
                f"a LoRA called {name!r} is loaded already; unload it first, or give this one another name"
            )
        used = [entry.kept.lora for entry in self._entries.values()]
        kept = next((kept for kept in self._kept.values() if kept.file is file and kept.lora not in used), None)
        if kept is None:
            stamp = _stamp(file.path)
            lora, report = load_lora(file, self._unet, self._text_encoder, allow_partial=allow_partial)
            kept = _Kept(file, lora, report, file_hash(report.path), stamp)
        taps = ExitStack()
        taps.enter_context(kept.lora.attached(strength))
        self._entries[name] = _Entry(kept, strength, taps)
        if self.keep and not allow_partial:
            self._remember(kept)
        self.to(self._unet.conv_in.weight.device, precision)
        return kept.report

    def _remember(self, kept: _Kept) -> None:
        place = os.fspath(kept.report.path)
        self._kept[place] = kept
        self._kept.move_to_end(place)
        while len(self._kept) > self.keep:
            self._kept.popitem(last=False)

    def unload(self, name: str | None) -> None:
        """Detach one LoRA, or all of them; the model is again what it was without."""
        if name is not None and name not in self._entries:
            raise UsageError(f"there is no LoRA called {name!r}; loaded are: {', '.join(self._entries) or 'none'}")
        for each in [*self._entries] if name is None else [name]:
            self._entries.pop(each).taps.close()

    def to(self, device: torch.device | str, precision: Precision) -> None:
        """Follow the model to `device` and `precision`."""
        for entry in self._entries.values():
            for name, layer in entry.kept.lora.layers.items():
                layer.follow(device, precision.unet if name.startswith("unet.") else precision.text_encoder)

    def describe(self) -> list[dict[str, Any]]:
        """What recipes say of them."""
        entries = [(entry.kept, entry.scale) for entry in self._entries.values()]
        return [
            {"file": kept.report.path.name, "sha256": kept.sha256, "scale": scale.as_json} for kept, scale in entries
        ]
