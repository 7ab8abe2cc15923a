"""Reading LoRA files of every dialect into a model, and saying how much of them fits it."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from latentdiff.adapters.lora.adapter import LoRA, LoRALayer
from latentdiff.adapters.lora.names import all_names, read_key
from latentdiff.adapters.lora.spec import adaptable
from latentdiff.checkpoints.architecture import identify, lora_dialect
from latentdiff.checkpoints.files import TensorFile, read_tensors
from latentdiff.errors import CheckpointError
from latentdiff.networks.unet import UNet

# What a folder that PEFT or diffusers wrote may call the file, the first that is there.
_IN_FOLDER = (
    "pytorch_lora_weights.safetensors",
    "adapter_model.safetensors",
    "pytorch_lora_weights.bin",
    "adapter_model.bin",
)
_SHOWN = 5  # offending layers in an error message
_OTHER_METHODS = {
    "hada_": "LoHa (LyCORIS)",
    "lokr_": "LoKr (LyCORIS)",
    "lora_mid": "LoCon with a middle matrix (LyCORIS)",
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "oft_": "OFT",
}


@dataclass(frozen=True)
class LoRAFile:
    """A LoRA file without a model: per layer, under the file's own name for it, tensors and alpha by role."""

    path: Path
    dialect: str  # "kohya", "peft" or "diffusers"
    layers: Mapping[str, Mapping[str, Tensor]]
    metadata: Mapping[str, str]
    peft: Mapping[str, Any] = field(default_factory=dict)  # PEFT's configuration, where there is one

    @property
    def ranks(self) -> list[int]:
        """Inner widths, each once."""
        return sorted({roles["down"].shape[0] for roles in self.layers.values() if _is_whole(roles)})

    @property
    def alphas(self) -> list[float]:
        """Alphas, each once; see `alpha`."""
        return sorted({self.alpha(name) for name, roles in self.layers.items() if _is_whole(roles)})

    def alpha(self, layer: str) -> float:
        """What the layer's change is multiplied by, times its rank; where the file says nothing, the rank."""
        roles = self.layers[layer]
        rank = roles["down"].shape[0]
        if "alpha" in roles:
            return float(roles["alpha"].float().reshape(()).item())
        part = layer.partition(".")[0] + "."
        prefix, path = (part, layer.removeprefix(part)) if part + "lora_alpha" in self.peft else ("", layer)
        if prefix + "lora_alpha" not in self.peft:
            return float(rank)
        alpha = self.peft[prefix + "lora_alpha"]
        for pattern, other in (self.peft.get(prefix + "alpha_pattern") or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", path.removeprefix("base_model.model.")):
                alpha = other
        return float(alpha) * (rank**0.5 if self.peft.get(prefix + "use_rslora") else 1.0)


@dataclass(frozen=True)
class LoadReport:
    """How much of a LoRA file was put to use: `matched` of `total` layers, and why the others were not."""

    path: Path
    dialect: str
    matched: int
    total: int
    problems: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"matched {self.matched} of {self.total} layers ({self.dialect} names)"


def read_lora(path: str | os.PathLike[str]) -> LoRAFile:
    """Read a LoRA file, or the folder in which PEFT or diffusers saved one. Nothing in it is executed.

    Raises:
        CheckpointError: nothing is there, it is damaged, or it is no LoRA.
    """
    place = _locate(Path(path))
    file = read_tensors(place)
    layers: dict[str, dict[str, Tensor]] = {}
    for key, tensor in file.tensors.items():
        layer, role = read_key(key)
        layers.setdefault(layer, {})[role] = tensor
    if not any("down" in roles or _other_method(roles) for roles in layers.values()):
        found = identify({name: tuple(tensor.shape) for name, tensor in file.tensors.items()})
        raise CheckpointError(f"expected a LoRA, found that {place} is another thing: {found.family}")
    return LoRAFile(place, lora_dialect(file.tensors), layers, file.metadata, _peft_config(place, file))


def load_lora(
    path: str | os.PathLike[str], unet: UNet, text_encoder: nn.Module | None, *, allow_partial: bool = False
) -> tuple[LoRA, LoadReport]:
    """Make the LoRA of a file for a model: names of kohya's tools, of PEFT or of diffusers, convolutions too.

    Args:
        path: a safetensors file (or a pickle of tensors), or a folder that PEFT or diffusers wrote.
        unet, text_encoder: the model, which stays as it is; attach the LoRA, or merge it.
        allow_partial: leave out what does not fit, as long as something does.

    Returns:
        The LoRA in float32, and a report that says "matched 264 of 264 layers".

    Raises:
        CheckpointError: nothing is there, it is damaged, no LoRA, or one for another model.
    """
    file = read_lora(path)
    targets = dict(adaptable(unet, text_encoder))
    known = all_names(targets, unet.config)
    layers: dict[str, LoRALayer] = {}
    problems = []
    for name, roles in file.layers.items():
        full = known.get(name)
        problem = f"{name} (the model has no such layer)" if full is None else _problem(name, roles, targets[full])
        if problem is None and full in layers:
            problem = f"{name} (a second time)"
        if problem:
            problems.append(problem)
        else:
            layers[full] = _fill(LoRALayer(targets[full], roles["down"].shape[0], file.alpha(name)), roles)
    report = LoadReport(file.path, file.dialect, len(layers), len(file.layers), tuple(problems))
    if problems and not (allow_partial and layers):
        raise CheckpointError(_does_not_fit(file, report, unet))
    ordered = {name: layers[name] for name in targets if name in layers}
    return LoRA(ordered, unet, text_encoder, file.metadata).to(unet.conv_in.weight.device), report


def _locate(path: Path) -> Path:
    if path.is_dir():
        for name in _IN_FOLDER:
            if (path / name).exists():
                return path / name
        raise CheckpointError(
            f"expected a LoRA file in {path}, one of {', '.join(_IN_FOLDER)}; found none: name the file"
        )
    if not path.exists():
        raise CheckpointError(f"there is no LoRA file {path}")
    return path


def _peft_config(path: Path, file: TensorFile) -> dict[str, Any]:
    """Where PEFT's alpha is: in the metadata (diffusers), or in a file beside the weights (PEFT)."""
    beside = path.with_name("adapter_config.json")
    if "lora_adapter_metadata" in file.metadata:
        text = file.metadata["lora_adapter_metadata"]
    elif path.stem == "adapter_model" and beside.exists():
        text = beside.read_text(encoding="utf-8")
    else:
        return {}
    try:
        config = json.loads(text)
    except ValueError as error:
        raise CheckpointError(
            f"{path} comes with a PEFT configuration that is no JSON ({error}); save it again"
        ) from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} comes with a PEFT configuration that is no dictionary; save it again")
    return config


def _problem(name: str, roles: Mapping[str, Tensor], target: nn.Module) -> str | None:
    """Why a layer of the file cannot adapt the layer that it names; None if it can."""
    if method := _other_method(roles):
        return f"{name} ({method}, which is not supported)"
    if extra := sorted(roles.keys() - {"down", "up", "alpha"}):
        return f"{name} (unknown tensor {extra[0]})"
    if missing := [role for role in ("down", "up") if role not in roles]:
        return f"{name} (its {missing[0]} matrix is missing)"
    rank = roles["down"].shape[0] if roles["down"].ndim else 0
    weight = target.weight
    expected = {"down": (rank, *weight.shape[1:]), "up": (weight.shape[0], rank, *(1,) * (weight.ndim - 2))}
    for role, shape in expected.items():
        if rank == 0 or _without_window(roles[role].shape) != _without_window(shape):
            return f"{name} ({role}: expected {_show(shape)}, found {_show(roles[role].shape)})"
    if roles.get("alpha", torch.zeros(1)).numel() != 1:
        return f"{name} (alpha: expected one number, found {_show(roles['alpha'].shape)})"
    if not all(torch.isfinite(tensor.float()).all() for tensor in roles.values()):
        return f"{name} (holds NaN or infinity)"
    return None


def _is_whole(roles: Mapping[str, Tensor]) -> bool:
    return "down" in roles and roles["down"].ndim > 1 and roles.get("alpha", torch.zeros(1)).numel() == 1


def _fill(layer: LoRALayer, roles: Mapping[str, Tensor]) -> LoRALayer:
    for role, part in (("down", layer.lora_down), ("up", layer.lora_up)):
        part.weight.data.copy_(roles[role].reshape(part.weight.shape))
    return layer


def _without_window(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The same matrix as a linear layer and as a 1x1 convolution."""
    return tuple(shape[:2]) if tuple(shape[2:]) == (1, 1) else tuple(shape)


def _other_method(roles: Mapping[str, Tensor]) -> str | None:
    return next((name for role in roles for start, name in _OTHER_METHODS.items() if role.startswith(start)), None)


def _does_not_fit(file: LoRAFile, report: LoadReport, unet: UNet) -> str:
    shown = ", ".join(report.problems[:_SHOWN])
    more = f" and {len(report.problems) - _SHOWN} more" if len(report.problems) > _SHOWN else ""
    theirs, ours = made_for(file), _family(unet.config.cross_attention_dim)
    guess = "is damaged or not supported" if theirs == ours else f"was made for {theirs}, this model is {ours}"
    return f"the LoRA {file.path} does not fit this model: {report}; not {shown}{more}. Probably it {guess}"


def made_for(file: LoRAFile) -> str:
    """A guess, from names and widths, of the family of models that a LoRA was made for."""
    names = " ".join(file.layers)
    if re.search(r"double_blocks|single_blocks|single_transformer_blocks", names):
        return "Flux"
    if re.search(r"joint_blocks|(^| )transformer\.transformer_blocks", names):
        return "Stable Diffusion 3"
    if re.search(r"lora_te2_|text_encoder_2\.|add_embedding|label_emb|transformer_blocks[._]1[._]", names):
        return "Stable Diffusion XL"
    keys = [
        roles["down"] for name, roles in file.layers.items() if re.search(r"attn2[._]to_k$", name) and "down" in roles
    ]
    return _family(keys[0].shape[1]) if keys and keys[0].ndim > 1 else "another model"


def _family(text_width: int) -> str:
    families = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x", 2048: "Stable Diffusion XL"}
    return families.get(text_width, f"a model of text width {text_width}")


def _show(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "one number"
