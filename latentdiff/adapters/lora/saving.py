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
from latentdiff.adapters.lora.kinds import Change, LoRALayer
from latentdiff.adapters.lora.kinds.relative import DoRA
from latentdiff.checkpoints.folder import save_tensors
from latentdiff.errors import UsageError
from latentdiff.request.options import LoRADialect

# What the roles of `kinds` are called in a file, where that is not the same.
_ROLES = {
    "down": "lora_down.weight", "up": "lora_up.weight", "mid": "lora_mid.weight", "magnitude": "dora_scale",
    **{name: f"{name}.weight" for name in ("a1", "a2", "b1", "b2", "bm")},
}  # fmt: skip
_PEFT_ONLY = {"oft_R", "ia3_l", "up_bias"}


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
        UsageError: another dialect, another kind of file, or changes of a kind that the PEFT dialect has no names for.
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
    """Every LoRA layer gets the same alpha: diffusers loses those that differ from the most common one."""
    alpha = _common_alpha(lora)
    tensors, stems = {}, lora.file_names
    for name, layer in lora.layers.items():
        stem = stems[name]
        if isinstance(layer, LoRALayer):
            tensors[f"{stem}.lora_down.weight"] = layer.lora_down.weight
            tensors[f"{stem}.lora_up.weight"] = _scaled(layer.lora_up.weight, layer.alpha / alpha)
            tensors[f"{stem}.alpha"] = torch.tensor(alpha, dtype=torch.float32)
        else:
            tensors |= {f"{stem}.{role}": tensor for role, tensor in _as_read(name, layer).items()}
    return tensors


def _as_read(name: str, layer: Change) -> dict[str, Tensor]:
    """The tensors of a change of another kind, under LyCORIS' names, which say whose they are."""
    tensors = {_ROLES.get(role, role): tensor for role, tensor in layer.tensors().items()}
    if peft := sorted(tensors.keys() & _PEFT_ONLY):
        raise UsageError(f"{name} has {layer.kind}, which other dialects have no name for ({peft[0]}); keep the file")
    alpha = next((change.facts.alpha for change in layer.modules() if getattr(change, "facts", None)), None)
    inner = next((change for change in layer.modules() if isinstance(change, LoRALayer)), None)
    alpha = inner.alpha if inner is not None else alpha
    return tensors if alpha is None else {**tensors, "alpha": torch.tensor(float(alpha), dtype=torch.float32)}


def _peft(lora: LoRA) -> dict[str, Tensor]:
    """The dialect has no place for alpha; without one it is the rank."""
    tensors = {}
    for name, layer in lora.layers.items():
        pair = layer.inner if isinstance(layer, DoRA) and layer.axis == 0 else layer
        if not isinstance(pair, LoRALayer):
            raise UsageError(
                f"the PEFT dialect is written for LoRA and for DoRA with lengths of outputs, {name} has {layer.kind}"
                f"{' with lengths of inputs' if isinstance(layer, DoRA) else ''}; use kohya"
            )
        tensors[f"{name}.lora_A.weight"] = pair.lora_down.weight
        tensors[f"{name}.lora_B.weight"] = _scaled(pair.lora_up.weight, pair.factor)
        if isinstance(layer, DoRA):
            ones = [1] * (pair.lora_up.weight.ndim - 2)
            tensors[f"{name}.lora_magnitude_vector"] = layer.lengths.view(1, -1, *ones) if ones else layer.lengths
    return tensors


def _scaled(weight: Tensor, factor: float) -> Tensor:
    return weight if factor == 1 else (weight.float() * factor).to(weight.dtype)


def _network(lora: LoRA) -> dict[str, str]:
    """Of a LoRA; a file of another kind keeps what its own tool wrote."""
    ranks = Counter(layer.rank for layer in _plain(lora))
    if len(ranks) == 0 or len(_plain(lora)) < len(lora.layers):
        return {}
    return {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(ranks.most_common(1)[0][0]),
        "ss_network_alpha": str(_common_alpha(lora)),
    }


def _plain(lora: LoRA) -> list[LoRALayer]:
    return [layer for layer in lora.layers.values() if isinstance(layer, LoRALayer)]


def _common_alpha(lora: LoRA) -> float:
    return Counter(float(layer.alpha) for layer in _plain(lora)).most_common(1)[0][0] if _plain(lora) else 1.0
