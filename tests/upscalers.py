"""Small upscalers with random weights in the layouts that people have, made by spandrel's own networks."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests import tiny

if importlib.util.find_spec("spandrel") is None:
    pytest.skip("spandrel is not installed", allow_module_level=True)


@contextmanager
def _torchvision_if_missing() -> Iterator[None]:
    """Two of spandrel's networks, not these, import three names of torchvision, which may not be here."""
    names = ("torchvision", "torchvision.transforms", "torchvision.transforms.functional")
    missing = importlib.util.find_spec("torchvision") is None
    if missing:
        sys.modules.update({name: ModuleType(name) for name in names})
        vars(sys.modules[names[-1]]).update(dict.fromkeys(("InterpolationMode", "rotate", "normalize")))
    try:
        yield
    finally:
        for name in names if missing else ():
            del sys.modules[name]


@cache
def spandrel() -> Any:
    with _torchvision_if_missing():
        import spandrel

    return spandrel


def esrgan(
    scale: int = 4, *, blocks: int = 1, width: int = 8, seed: int = 0, **options: Any
) -> dict[str, torch.Tensor]:
    """The weights of a small ESRGAN in the names of its first code, whose output is a picture of its input."""
    spandrel()
    from spandrel.architectures.ESRGAN import ESRGAN

    torch.manual_seed(seed)
    network = tiny.randomize(ESRGAN(num_filters=width, num_blocks=blocks, scale=scale, **options), seed)
    last = max(int(name.split(".")[1]) for name in network.state_dict())
    with torch.no_grad():
        network.model[last].bias += 0.5
    return dict(network.state_dict())


def new_names(weights: dict[str, torch.Tensor], blocks: int = 1) -> dict[str, torch.Tensor]:
    """Those of a 4x in the names of Real-ESRGAN."""
    found = {}
    outer = {"0": "conv_first", "3": "conv_up1", "6": "conv_up2", "8": "conv_hr", "10": "conv_last"}
    for name, tensor in weights.items():
        parts = name.split(".")
        if parts[1] == "1" and parts[3] == str(blocks):
            found[f"conv_body.{parts[-1]}"] = tensor
        elif parts[1] == "1":
            found[f"body.{parts[3]}.{parts[4].lower()}.{parts[5]}.{parts[-1]}"] = tensor
        else:
            found[f"{outer[parts[1]]}.{parts[-1]}"] = tensor
    return found


def saved(weights: dict[str, torch.Tensor], path: Path) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, path)
    return path


def theirs(weights: dict[str, torch.Tensor]) -> Any:
    """The network that spandrel makes of them."""
    return spandrel().MAIN_REGISTRY.load(weights)
