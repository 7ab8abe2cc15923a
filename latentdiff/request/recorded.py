"""What recipes keep of what steers besides the prompt. Files are {"file": name, "sha256": ...}. Loads no heavy library."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

File = dict[str, str]
# How roles of files or folders with weights begin.
MODEL_ROLES = ("control_model", "ip_adapter", "image_encoder", "upscaler", "hires_upscaler", "depth_model")
_STRICT: dict[str, Any] = {"extra": "forbid", "strict": True, "allow_inf_nan": False}  # for pydantic


@dataclass(frozen=True, kw_only=True)
class RecordedControl:
    """A ControlNet with its image."""

    model: File
    image: File
    mask: File | None = None
    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0
    guess: bool = False
    prepare: str | None = None
    mode: str | None = None

    __pydantic_config__ = _STRICT

    def roles(self, number: int) -> dict[str, File]:
        """Its files by their roles in a recipe, of which it is control number `number`."""
        parts = {"image": self.image, "mask": self.mask, "model": self.model}
        return {f"control_{part}{number}": entry for part, entry in parts.items() if entry is not None}


@dataclass(frozen=True, kw_only=True)
class RecordedRegion:
    """A prompt for a part of the image: in a box, left, top, right and bottom as shares of it, or by a mask."""

    prompt: str
    box: list[float] | None = None
    mask: File | None = None
    weight: float

    __pydantic_config__ = _STRICT

    def roles(self, number: int) -> dict[str, File]:
        """Its file by its role in a recipe, of which it is region number `number`."""
        return {} if self.mask is None else {f"region_mask{number}": self.mask}


@dataclass(frozen=True, kw_only=True)
class RecordedImagePrompt:
    """An IP-Adapter with its image encoder and images."""

    adapter: File
    encoder: File
    images: list[File]
    negative: File | None = None
    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0
    blocks: str | dict[str, float] | None = None

    __pydantic_config__ = _STRICT

    def roles(self, number: int) -> dict[str, File]:
        """Its files by their roles in a recipe, of which it is image prompt number `number`; images after the first are
        numbered behind a line, "image_prompt1_2"."""
        images = {f"image_prompt{number}{f'_{n}' * (n > 1)}": entry for n, entry in enumerate(self.images, 1)}
        negative = {} if self.negative is None else {f"negative_image_prompt{number}": self.negative}
        return {**images, **negative, f"ip_adapter{number}": self.adapter, f"image_encoder{number}": self.encoder}
