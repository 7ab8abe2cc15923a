"""The "Hires. fix" of AUTOMATIC1111's web UI and its kin: a second, larger pass, field by field."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial

from latentdiff.request.foreign.account import Draft
from latentdiff.request.infotext import UPSCALERS

Handler = Callable[[Draft, str, str], None]
_OF_PASS = ("Hires upscale", "Hires resize")
# Fields that say that the second pass is like the first, if they say the same as this one of the first.
_SAME = {"Hires sampler": "Sampler", "Hires schedule type": "Schedule type", "Hires CFG Scale": "CFG scale"}
_LIKE_FIRST = ("Use same sampler", "Use same scheduler", "Use same checkpoint", "Use same choices")
_STAGED = re.compile(r"\[[^\[\]]*[:|][^\[\]]*\]")


def hires_handlers(settings: Mapping[str, str]) -> dict[str, Handler]:
    """What reads the fields of a second pass, "Denoising strength" among them; nothing if there is none that is done here."""
    factor = _factor(settings)
    if factor is None:
        return {}
    names = [name for name in settings if name.startswith("Hires ")]
    handlers: dict[str, Handler] = dict.fromkeys(names, _refused)
    handlers |= {name: _scale(factor) for name in _OF_PASS}
    handlers |= {"Hires upscaler": _upscaler, "Hires steps": _steps}
    handlers["Denoising strength"] = lambda draft, name, value: draft.number(name, value, "hires_strength")
    for name, first in _SAME.items():
        handlers[name] = partial(_same, settings.get(first, ""))
    handlers["Hires checkpoint"] = handlers["Hires Module 1"] = partial(_same, "")
    return handlers


def _factor(settings: Mapping[str, str]) -> float | None:
    """How much larger the image is, along both sides."""
    size, resize = (re.fullmatch(r"(\d{1,6})x(\d{1,6})", settings.get(name, "")) for name in ("Size", "Hires resize"))
    try:
        if "Hires upscale" in settings:
            factor = float(settings["Hires upscale"])
        elif size and resize and int(resize[1]) * int(size[2]) == int(resize[2]) * int(size[1]):
            factor = int(resize[1]) / int(size[1])
        else:
            return None
    except (ValueError, ZeroDivisionError):
        return None
    return factor if 1.0 < factor <= 8.0 else None


def _scale(factor: float) -> Handler:
    def read(draft: Draft, name: str, value: str) -> None:
        if _STAGED.search(draft.options.get("prompt", "")):
            draft.approximate(name, value, "what changes over the steps starts again in the second pass", hires=factor)
        else:
            draft.honour(name, value, hires=factor)

    return read


def _upscaler(draft: Draft, name: str, value: str) -> None:
    known = UPSCALERS.get(value)
    if known is None:
        draft.approximate(name, value, "enlarged by Lanczos in its place", hires_upscaler="lanczos")
    elif known == "lanczos":
        draft.approximate(name, value, "other noise in encoding the enlarged image", hires_upscaler=known)
    else:
        draft.honour(name, value, hires_upscaler=known)


def _steps(draft: Draft, name: str, value: str) -> None:
    if value == "0":
        draft.honour(name, value, "as many as in the first pass")
    else:
        draft.number(name, value, "hires_steps", int)


def _same(first: str, draft: Draft, name: str, value: str) -> None:
    if value == first or value in _LIKE_FIRST:
        draft.honour(name, value, "as in the first pass")
    else:
        _refused(draft, name, value)


def _refused(draft: Draft, name: str, value: str) -> None:
    draft.refuse(name, value, "the second pass here is like the first in this")
