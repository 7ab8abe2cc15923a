"""Operators as JSON values, for recipes: what `describe` writes, `from_description` reads."""

from __future__ import annotations

import base64
import zlib
from typing import Any

import numpy as np
import torch
from torch import Tensor

from latentdiff.errors import DataError
from latentdiff.tasks.restoration.operators.composition import Composition, Inside
from latentdiff.tasks.restoration.operators.convolution import Deblur, SuperResolution
from latentdiff.tasks.restoration.operators.operator import Operator
from latentdiff.tasks.restoration.operators.pointwise import Colourise, Denoise, Inpaint

OWN_FUNCTION = "function"


def describe(operator: Operator) -> dict[str, Any]:
    """The operator as JSON values, mask and kernel included. Of a function of the user's own, only that it is one."""
    about = {"noise_std": operator.noise_std}
    match operator:
        case Denoise():
            return {"name": "denoise", **about}
        case Colourise():
            return {"name": "colourise", **about}
        case Inpaint():
            return {"name": "inpaint", "missing": _packed((~operator.known).cpu()), **about}
        case SuperResolution():
            own = {"factor": operator.factor, "kernel": operator.name, "border": operator.border}
            return {"name": "super-resolution", **own, **about}
        case Deblur():
            return {"name": "deblur", "kernel": _packed(operator.kernel), "border": operator.border, **about}
        case Composition():
            return {"name": "composition", "operators": [describe(part) for part in operator.operators], **about}
        case Inside():
            return {
                "name": "inside",
                "operator": describe(operator.operator),
                "part": operator.part,
                "whole": operator.whole,
            }
    return {"name": OWN_FUNCTION, **about}


def from_description(values: dict[str, Any]) -> Operator:
    """The operator that `describe` described.

    Raises:
        DataError: it was a function of the user's own, or the values describe none.
    """
    values = dict(values)
    name = values.pop("name", None)
    if name == OWN_FUNCTION:
        raise DataError("the image was restored with an operator of one's own, which a recipe does not hold")
    try:
        match name:
            case "denoise":
                return Denoise(**values)
            case "colourise":
                return Colourise(**values)
            case "inpaint":
                return Inpaint(_unpacked(values.pop("missing")), **values)
            case "super-resolution":
                return SuperResolution(**values)
            case "deblur":
                return Deblur(_unpacked(values.pop("kernel")), **values)
            case "composition":
                return Composition(*map(from_description, values.pop("operators")), **values)
            case "inside":
                return Inside(from_description(values["operator"]), tuple(values["part"]), tuple(values["whole"]))
    except (KeyError, TypeError, ValueError, zlib.error) as error:
        raise DataError(f"the recipe's operator {name!r} cannot be read: {error}") from error
    raise DataError(f"the recipe names an operator that this latentdiff does not know: {name!r}")


def _packed(array: Tensor) -> dict[str, Any]:
    values = array.numpy()
    raw = np.packbits(values).tobytes() if values.dtype == bool else values.astype("<f8").tobytes()
    kind = "bits" if values.dtype == bool else "float64"
    return {"kind": kind, "shape": list(values.shape), "zlib": base64.b64encode(zlib.compress(raw, 9)).decode("ascii")}


def _unpacked(packed: dict[str, Any]) -> Tensor:
    raw = zlib.decompress(base64.b64decode(packed["zlib"]))
    if packed["kind"] == "bits":
        values = np.unpackbits(np.frombuffer(raw, np.uint8), count=int(np.prod(packed["shape"]))).astype(bool)
    else:
        values = np.frombuffer(raw, "<f8").copy()
    return torch.from_numpy(values.reshape(packed["shape"]))
