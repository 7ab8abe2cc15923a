"""What the LoRA files of the field call the layers of a model. Full names are ours: `unet.…` or `text_encoder.…`."""

from __future__ import annotations

_KOHYA = {"unet": "lora_unet_", "text_encoder": "lora_te_"}


def kohya_name(name: str) -> str:
    """The layer's name in the files of kohya's tools, which the web UIs read: dots become underscores."""
    part, _, path = name.partition(".")
    return _KOHYA[part] + path.replace(".", "_")
