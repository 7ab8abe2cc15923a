"""Adapter files without a model: which layers they name, of what kinds, and what they were made for."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor

from latentdiff.adapters.lora.kinds import Facts, kind_names, rank_of
from latentdiff.adapters.lora.names import BUNDLED, read_key
from latentdiff.adapters.lora.peft import PEFTConfig
from latentdiff.checkpoints.architecture import identify, lora_dialect
from latentdiff.checkpoints.files import read_tensors
from latentdiff.errors import CheckpointError

# What a folder that PEFT or diffusers wrote may call the file, the first that is there.
_IN_FOLDER = (
    "pytorch_lora_weights.safetensors",
    "adapter_model.safetensors",
    "pytorch_lora_weights.bin",
    "adapter_model.bin",
)
_BUNDLED = re.compile(rf"{re.escape(BUNDLED)}(?P<word>.+?)\.(string_to_param\.\*|emb_params)")


@dataclass(frozen=True)
class LoRAFile:
    """An adapter file without a model: per layer, under the file's own name for it, tensors and alpha by role."""

    path: Path
    dialect: str  # "kohya", "peft" or "diffusers"
    layers: Mapping[str, Mapping[str, Tensor]]
    metadata: Mapping[str, str]
    words: Mapping[str, Tensor] = field(default_factory=dict)  # embeddings that come along, (n, width)
    peft: PEFTConfig = field(default_factory=lambda: PEFTConfig(Path()))

    @property
    def kinds(self) -> Counter[str]:
        """How many layers are changed in which way."""
        return Counter(kind_names(roles) for roles in self.layers.values())

    @property
    def ranks(self) -> list[int]:
        """Inner widths, each once."""
        return sorted({rank for roles in self.layers.values() if (rank := rank_of(roles))})

    @property
    def alphas(self) -> list[float]:
        """Alphas, each once; where the file says nothing, the rank."""
        return sorted({alpha for name in self.layers if (alpha := self.alpha(name)) is not None})

    def alpha(self, layer: str) -> float | None:
        """What the layer's change is multiplied by, times its rank; None for changes without a rank."""
        rank = rank_of(self.layers[layer])
        stated = self.facts(layer).alpha
        return None if rank is None else float(rank) if stated is None else stated

    def facts(self, layer: str) -> Facts:
        """What the file says of a layer besides its matrices.

        Raises:
            CheckpointError: PEFT's configuration makes no sense.
        """
        roles = self.layers[layer]
        facts = self.peft.facts(layer, rank_of(roles))
        alpha = roles.get("alpha")
        return facts if alpha is None or alpha.numel() != 1 else replace(facts, alpha=float(alpha.float().item()))


def read_lora(path: str | os.PathLike[str]) -> LoRAFile:
    """Read an adapter file, or the folder in which PEFT or diffusers saved one. Nothing in it is executed.

    Raises:
        CheckpointError: nothing is there, it is damaged, or it is no adapter.
    """
    place = _locate(Path(path))
    file = read_tensors(place)
    shapes = {name: tuple(tensor.shape) for name, tensor in file.tensors.items()}
    if (found := identify(shapes)).kind != "lora":
        raise CheckpointError(f"expected a LoRA, found that {place} is another thing: {found.family}")
    layers: dict[str, dict[str, Tensor]] = {}
    words: dict[str, Tensor] = {}
    for key, tensor in file.tensors.items():
        if match := _BUNDLED.fullmatch(key):
            words[match["word"]] = tensor
        elif not key.startswith(BUNDLED):
            layer, role = read_key(key)
            layers.setdefault(layer, {})[role] = tensor
    return LoRAFile(place, lora_dialect(file.tensors), layers, file.metadata, words, PEFTConfig.of(file))


def made_for(file: LoRAFile) -> str:
    """A guess, from names and widths, of the family of models that an adapter was made for."""
    names = " ".join(file.layers)
    if re.search(r"double_blocks|single_blocks|single_transformer_blocks", names):
        return "Flux"
    if re.search(r"joint_blocks|(^| )transformer\.transformer_blocks", names):
        return "Stable Diffusion 3"
    if re.search(r"lora_te2_|text_encoder_2\.|add_embedding|label_emb|transformer_blocks[._]1[._]", names):
        return "Stable Diffusion XL"
    keys = [_input_width(roles) for name, roles in file.layers.items() if re.search(r"attn2[._]to_k$", name)]
    return family_of(keys[0]) if keys and keys[0] else "another model"


def family_of(text_width: int) -> str:
    """What people call the models whose U-Net reads embeddings of this width."""
    families = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x", 2048: "Stable Diffusion XL"}
    return families.get(text_width, f"a model of text width {text_width}")


def _input_width(roles: Mapping[str, Tensor]) -> int | None:
    matrices = (roles[role] for role in ("down", "hada_w1_b", "diff") if role in roles)
    return next((matrix.shape[1] for matrix in matrices if matrix.ndim > 1), None)


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
