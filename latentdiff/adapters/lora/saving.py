"""Writing LoRA files."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor

from latentdiff.adapters.lora.adapter import LoRA
from latentdiff.adapters.lora.names import kohya_name
from latentdiff.checkpoints.folder import save_tensors
from latentdiff.errors import UsageError
from latentdiff.request.options import LoRADialect


def save_lora(
    lora: LoRA, path: str | os.PathLike[str], metadata: Mapping[str, str] | None = None, *, dialect: str = "kohya"
) -> None:
    """Write a LoRA as a safetensors file, atomically, in the precision that it has.

    A file in the kohya dialect opens in kohya's tools, in the web UIs, and in diffusers (`load_lora_weights`); one in
    the PEFT dialect in diffusers alone.

    Args:
        path: a name that ends in .safetensors.
        metadata: see `lora_metadata`; None keeps what the LoRA was loaded with.
        dialect: "kohya" or "peft".

    Raises:
        UsageError: another dialect, or another kind of file.
        LatentDiffError: the file cannot be written.
    """
    if dialect not in get_args(LoRADialect):
        raise UsageError(f"unknown LoRA dialect {dialect!r}; choose from {', '.join(get_args(LoRADialect))}")
    if Path(path).suffix != ".safetensors":
        raise UsageError(f"expected a name that ends in .safetensors for the LoRA, found {path}")
    about = dict(lora.metadata if metadata is None else metadata)
    about |= {"format": "pt"}
    if dialect == "kohya":
        about |= _network(lora)
    else:
        about = {name: text for name, text in about.items() if not name.startswith("ss_network_")}
    save_tensors(_kohya(lora) if dialect == "kohya" else _peft(lora), Path(path), about)


def _kohya(lora: LoRA) -> dict[str, Tensor]:
    """Every layer gets the same alpha: diffusers loses those that differ from the most common one."""
    alpha = _common_alpha(lora)
    tensors = {}
    for name, layer in lora.layers.items():
        stem = kohya_name(name)
        tensors[f"{stem}.lora_down.weight"] = layer.lora_down.weight
        tensors[f"{stem}.lora_up.weight"] = _scaled(layer.lora_up.weight, layer.alpha / alpha)
        tensors[f"{stem}.alpha"] = torch.tensor(alpha)
    return tensors


def _peft(lora: LoRA) -> dict[str, Tensor]:
    """The dialect has no place for alpha; without one it is the rank."""
    tensors = {}
    for name, layer in lora.layers.items():
        tensors[f"{name}.lora_A.weight"] = layer.lora_down.weight
        tensors[f"{name}.lora_B.weight"] = _scaled(layer.lora_up.weight, layer.factor)
    return tensors


def _scaled(weight: Tensor, factor: float) -> Tensor:
    return weight if factor == 1 else (weight.float() * factor).to(weight.dtype)


def _network(lora: LoRA) -> dict[str, str]:
    ranks = Counter(layer.rank for layer in lora.layers.values())
    return {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(ranks.most_common(1)[0][0]),
        "ss_network_alpha": str(_common_alpha(lora)),
    }


def _common_alpha(lora: LoRA) -> float:
    return Counter(float(layer.alpha) for layer in lora.layers.values()).most_common(1)[0][0]
