"""The LoRAs that a pipeline has loaded: several at once, each with its own scale, each removable without a trace."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from latentdiff.adapters.lora.adapter import LoRA
from latentdiff.adapters.lora.loading import LoadReport, load_lora
from latentdiff.adapters.lora.reading import LoRAFile
from latentdiff.adapters.lora.strength import Strength
from latentdiff.checkpoints.hashing import file_hash
from latentdiff.device import Precision
from latentdiff.errors import UsageError
from latentdiff.networks.text_encoder import TextEncoder
from latentdiff.networks.text_encoders import TextEncoders
from latentdiff.networks.unet import UNet


@dataclass(frozen=True)
class _Entry:
    lora: LoRA
    scale: Strength
    path: Path
    sha256: str
    taps: ExitStack


class LoadedLoRAs:
    """LoRAs attached to one model, by name, in the order of loading.

    Args:
        unet, text_encoder: the model. Its weights are never touched.
    """

    def __init__(self, unet: UNet, text_encoder: TextEncoder | TextEncoders) -> None:
        self._unet, self._text_encoder = unet, text_encoder
        self._entries: dict[str, _Entry] = {}

    def __contains__(self, name: str | None) -> bool:
        return name in self._entries

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
        strength = Strength.of(scale)
        strength.check(self._unet.config)
        if name in self._entries:
            raise UsageError(
                f"a LoRA called {name!r} is loaded already; unload it first, or give this one another name"
            )
        lora, report = load_lora(file, self._unet, self._text_encoder, allow_partial=allow_partial)
        taps = ExitStack()
        taps.enter_context(lora.attached(strength))
        self._entries[name] = _Entry(lora, strength, report.path, file_hash(report.path), taps)
        self.to(self._unet.conv_in.weight.device, precision)
        return report

    def unload(self, name: str | None) -> None:
        """Detach one LoRA, or all of them; the model is again what it was without."""
        if name is not None and name not in self._entries:
            raise UsageError(f"there is no LoRA called {name!r}; loaded are: {', '.join(self._entries) or 'none'}")
        for each in [*self._entries] if name is None else [name]:
            self._entries.pop(each).taps.close()

    def to(self, device: torch.device | str, precision: Precision) -> None:
        """Follow the model to `device` and `precision`."""
        for entry in self._entries.values():
            for name, layer in entry.lora.layers.items():
                layer.follow(device, precision.unet if name.startswith("unet.") else precision.text_encoder)

    def describe(self) -> list[dict[str, Any]]:
        """What recipes say of them."""
        return [{"file": e.path.name, "sha256": e.sha256, "scale": e.scale.as_json} for e in self._entries.values()]
