"""The kinds of changes that adapter files hold, one class each; a new one is written and named in `KINDS`.

change       what all kinds are asked
low_rank     LoRA, and its form with a middle matrix
products     LoHa, LoKr
rotations    OFT, BOFT
relative     IA3, GLoRA, DoRA
differences  whole weights, norms, biases
new          those that are trained here, at their start
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import replace

import torch
from torch import Tensor, nn

from latentdiff.adapters.lora.kinds.change import Facts, LayerChange, Misfit, Several, show
from latentdiff.adapters.lora.kinds.differences import Bias, Full, Norm, NormBias, UpBias
from latentdiff.adapters.lora.kinds.low_rank import LoRALayer, Tucker
from latentdiff.adapters.lora.kinds.products import LoHa, LoKr
from latentdiff.adapters.lora.kinds.relative import IA3, PEFTIA3, DoRA, GLoRA
from latentdiff.adapters.lora.kinds.rotations import BOFT, OFT, InputOFT

__all__ = [
    "KINDS", "Change", "Facts", "LayerChange", "LoRALayer", "Misfit", "Several", "kind_names", "rank_of", "read_change",
]  # fmt: skip

Change = LayerChange | LoRALayer | DoRA | Several

# The first whose tensors are all there takes them; what is left is asked for again.
KINDS: tuple[type[LayerChange] | type[LoRALayer], ...] = (
    Tucker, LoRALayer, LoHa, LoKr, BOFT, OFT, InputOFT, IA3, PEFTIA3, GLoRA, Full, Norm, Bias, NormBias, UpBias,
)  # fmt: skip

_LENGTHS = {"dora_scale": "DoRA", "magnitude": "DoRA"}  # roles
_BESIDE = {"alpha", *_LENGTHS}
# What is known by name and cannot be used: why.
_UNSUPPORTED = {
    "lambda_layer": "T-LoRA, whose file does not hold the state that it is a difference from",
    "boft_R": "BOFT (PEFT), which is not supported",
    "vera_lambda": "VeRA (PEFT), which is not supported",
    "set_weight": "a replaced weight, which is not supported",
    "reshape_weight": "a reshaped weight, which is not supported",
}


def read_change(tensors: Mapping[str, Tensor], target: nn.Module, facts: Facts) -> Change:
    """The change of `target` that a file's tensors, by role, describe.

    Raises:
        Misfit: they are of no known kind, for a layer of another shape, or not finite.
    """
    _check_values(tensors)
    found: list[Change] = []
    left = tensors.keys() - _BESIDE
    while kind := _first(left, tensors):
        own = {role: tensors[role] for role in tensors if role in kind.needs | kind.takes and role in left}
        stated = replace(facts, rank=tensors["down"].shape[0]) if kind is UpBias and "down" in tensors else facts
        found.append(kind.of(own, target, stated))
        left = left - own.keys()
    if left or not found:
        raise Misfit(_what_is_wrong(left))
    if lengths := sorted(tensors.keys() & _LENGTHS.keys()):
        found[0] = _with_lengths(found[0], tensors[lengths[0]], lengths[0], target)
    return found[0] if len(found) == 1 else Several(found)


def kind_names(tensors: Mapping[str, Tensor]) -> str:
    """What people call the change that tensors of these roles make; "unknown" for none."""
    left, names = tensors.keys() - _BESIDE, []
    while kind := _first(left, tensors):
        names += [kind.kind] if kind.kind not in names else []
        left = left - kind.needs - kind.takes
    if not names or left:
        names.append(next((name.split(",")[0] for role, name in _UNSUPPORTED.items() if role in left), "unknown"))
    if tensors.keys() & _LENGTHS.keys():
        names[0] = "DoRA" if names[0] == "LoRA" else f"{names[0]} with DoRA"
    return " + ".join(names)


def rank_of(tensors: Mapping[str, Tensor]) -> int | None:
    """The inner width of the matrices; None where there is none."""
    roles = ("down", "hada_w1_b", "lokr_w2_b", "lokr_w1_b", "a2")
    return next((tensors[role].shape[0] for role in roles if role in tensors and tensors[role].ndim > 1), None)


def _first(roles: Set[str], tensors: Mapping[str, Tensor]) -> type[LayerChange] | type[LoRALayer] | None:
    kinds = (kind for kind in KINDS if roles & (kind.needs | kind.takes) and kind.reads(roles))
    # The same name in both: BOFT has one more size, for the stages.
    return next((kind for kind in kinds if kind is not BOFT or tensors["oft_blocks"].ndim == 4), None)


def _with_lengths(change: Change, lengths: Tensor, role: str, target: nn.Module) -> DoRA:
    if not isinstance(change, LoRALayer | Tucker | LoHa | LoKr):
        raise Misfit(f"DoRA of {change.kind}, which is not supported")
    is_of_inputs = role == "dora_scale" and lengths.ndim > 1 and lengths.shape[0] == 1 != target.weight.shape[0]
    axis = 1 if is_of_inputs else 0
    if lengths.numel() != target.weight.shape[axis]:
        raise Misfit(f"DoRA: expected {target.weight.shape[axis]} lengths, found {show(tuple(lengths.shape))}")
    return DoRA(change, lengths, axis, role, target.weight.ndim)


def _check_values(tensors: Mapping[str, Tensor]) -> None:
    if (alpha := tensors.get("alpha")) is not None and alpha.numel() != 1:
        raise Misfit(f"alpha: expected one number, found {show(tuple(alpha.shape))}")
    if not all(torch.isfinite(tensor.float()).all() for tensor in tensors.values()):
        raise Misfit("holds NaN or infinity")


def _what_is_wrong(left: Set[str]) -> str:
    if reasons := [reason for role, reason in _UNSUPPORTED.items() if role in left]:
        return reasons[0]
    begun = (sorted(kind.needs - left) for kind in KINDS if left & kind.needs and kind.needs - left)
    if missing := min(begun, key=len, default=None):
        return f"its {missing[0]} matrix is missing"
    return f"unknown tensor {sorted(left)[0]}" if left else "it has no matrices"
