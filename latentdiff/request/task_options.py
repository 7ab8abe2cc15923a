"""The domains of what tasks take besides the options of generation. Loads no heavy library, as `options` does not."""

from __future__ import annotations

from typing import Any, get_args

from latentdiff.errors import UsageError
from latentdiff.request.domains import Choice, Real, Whole, YesNo
from latentdiff.request.options import OPTIONS, SIDE, InversionName, TranslationName

_SIZE = {"width": SIDE, "height": SIDE}
_STEPS = {name: OPTIONS[name].domain for name in ("steps", "guidance_scale")}

NOISE_LEVEL = Whole(0, 350)  # of the x4 upscaler
VARY: dict[str, Any] = {"noise_level": Whole(0, 999)}
EDIT: dict[str, Any] = {"strength": Real(0, 1), "image_guidance_scale": Real(0), **_SIZE}
INPAINT: dict[str, Any] = {
    "remove": YesNo(),
    "invert_mask": YesNo(),
    "strength": Real(0, 1),
    "grow": Whole(),
    "blur": Real(),
    "only_masked": YesNo(),
    "padding": Whole(0),
    "repeats": Whole(1),
    "soft": YesNo(),
}
INTERPOLATE: dict[str, Any] = {"frames": Whole(2), "same_noise": YesNo(), **_SIZE}
INVERT: dict[str, Any] = {
    "method": Choice(get_args(InversionName)),
    "iterations": Whole(0),
    "mixing": Real(0, 1),
    "spacing": OPTIONS["spacing"].domain,
    "measure": YesNo(),
    "callback": OPTIONS["callback"].domain,
    "progress": OPTIONS["progress"].domain,
    **_STEPS,
    **_SIZE,
}
TRANSLATE: dict[str, Any] = {
    "method": Choice(get_args(TranslationName)),
    "negative_prompt": OPTIONS["negative_prompt"].domain,
    "tau_f": Real(0, 1),
    "tau_attn": Real(0, 1),
    **_STEPS,
}
RESTORE: dict[str, Any] = {
    "samples": OPTIONS["num_images"].domain,
    "noise_std": Real(0),
    "keep_measurement": YesNo(),
    **_STEPS,
}
# Of what happened to an image: how many times smaller it is, its noise, pixels of blur. The kernels grow with the square.
FACTOR, NOISE, MOTION = Whole(2, 64), Real(0), Real(1, 1024)
DAMAGE: dict[str, Any] = {"factor": FACTOR, "sigma": NOISE}

_INPUTS = ("mask", "inversion", "extend")
NAMES = frozenset(OPTIONS) | {
    *EDIT,
    *INPAINT,
    *INTERPOLATE,
    *INVERT,
    *TRANSLATE,
    *RESTORE,
    *DAMAGE,
    *_INPUTS,
    "noise_level",
}


def check_blur(std: float) -> float:
    """The standard deviation of a Gaussian blur in pixels.

    Raises:
        UsageError: it is not a number above 0 up to 128.
    """
    if not Real(0, 128)("the standard deviation of the blur", std):
        raise UsageError(f"expected a standard deviation above 0 pixels for the blur, found {std:g}")
    return float(std)
