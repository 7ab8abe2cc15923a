"""Learning rates by optimizer: what is taken where none is given, and what is said of one that does not fit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from latentdiff.training.sections import StageSection

# Lion's steps all have full size, so that it needs a rate three to ten times as small as AdamW, and a weight decay so much
# larger (Chen et al. 2023, section 5).
_OF_LION = 0.1
_LEAST_OF_PRODIGY = 0.1


def optimizer_defaults(optimizer: Any, usual: Mapping[str, Any]) -> dict[str, Any]:
    """What an optimizer needs otherwise than AdamW.

    Args:
        optimizer: its name, perhaps a wrong one.
        usual: the defaults for AdamW, of which `lr` is known.
    """
    if optimizer == "prodigy":
        return {"lr": 1.0}
    if optimizer == "schedulefree":
        return {"decay": "constant", "ema_decay": 0.0}
    if optimizer == "lion" and "lr" in usual:
        decay = usual.get("weight_decay", StageSection.model_fields["weight_decay"].default)
        return {"lr": usual["lr"] * _OF_LION, "weight_decay": decay / _OF_LION, "betas": (0.9, 0.99)}
    return {}


def rate_advice(settings: StageSection, usual_lr: float) -> str:
    """What is odd about a learning rate, for the one who gave it; "" if nothing is.

    Args:
        usual_lr: that of AdamW for the same method.
    """
    if settings.optimizer == "prodigy" and settings.lr < _LEAST_OF_PRODIGY:
        return f"prodigy multiplies the rate that it finds by lr: 1 is usual, {settings.lr:g} makes it learn that much less"
    if settings.optimizer == "lion" and settings.lr >= usual_lr:
        return f"lion wants a third to a tenth of the lr of adamw: about {usual_lr * _OF_LION:g} here, found {settings.lr:g}"
    return ""
