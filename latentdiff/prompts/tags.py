"""`<lora:name:weight>` in a prompt, as AUTOMATIC1111's web UI reads it."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from latentdiff.errors import UsageError

TAG = re.compile(r"<(\w+):([^>]+)>")
_LORA_KINDS = ("lora", "lyco")


@dataclass(frozen=True)
class LoRATag:
    """A LoRA that a prompt asks for, with its strengths in the text encoder and in the U-Net."""

    name: str
    text_scale: float = 1.0
    unet_scale: float = 1.0

    def __str__(self) -> str:
        return f"<lora:{self.name}:{self.text_scale:g}:{self.unet_scale:g}>"


def without_tags(text: str) -> tuple[str, list[LoRATag], list[str]]:
    """The prompt without its tags, the LoRAs that they name, and the tags of other kinds, which mean nothing here.

    One number is the strength in both networks, two are those of the text encoder and of the U-Net; `te=` and `unet=`
    name them.

    Raises:
        UsageError: a strength is not a number.
    """
    loras, others = [], []
    for kind, rest in TAG.findall(text):
        if kind in _LORA_KINDS:
            loras.append(_lora(rest))
        else:
            others.append(f"<{kind}:{rest}>")
    return TAG.sub("", text), loras, others


def _lora(rest: str) -> LoRATag:
    name, *arguments = rest.split(":")
    named = dict(argument.split("=", 1) for argument in arguments if "=" in argument)
    plain = [argument for argument in arguments if "=" not in argument]
    if not name.strip() or len(plain) > 2 or named.keys() - {"te", "unet"}:
        raise UsageError(f"expected <lora:NAME>, <lora:NAME:WEIGHT> or <lora:NAME:TEXT:UNET>, found <lora:{rest}>")
    text = _number(named.get("te", plain[0] if plain else "1"), rest)
    unet = _number(named["unet"], rest) if "unet" in named else _number(plain[1], rest) if len(plain) > 1 else text
    return LoRATag(name.strip(), text, unet)


def _number(text: str, rest: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UsageError(f"expected a number as strength in <lora:{rest}>, found {text!r}")
    return value
