"""IP-Adapters with small random weights in the layouts of published files, and CLIP image encoders of transformers."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests import peers, tiny

SIDE, HIDDEN, PROJECTED = 28, 40, 24  # of the image encoder


@cache
def encoder(seed: int = 1):
    """A CLIPVisionModelWithProjection: 28 pixels in patches of 14."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    config = CLIPVisionConfig(
        hidden_size=HIDDEN,
        intermediate_size=64,
        projection_dim=PROJECTED,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=SIDE,
        patch_size=14,
        hidden_act="gelu",
    )
    torch.manual_seed(seed)
    return tiny.randomize(CLIPVisionModelWithProjection(config), seed)


def saved_encoder(folder: Path) -> Path:
    place = folder / "image_encoder"
    if not place.exists():
        encoder().save_pretrained(place)
    return place


def adapter(family: str, kind: str, seed: int = 3) -> dict[str, dict[str, Tensor]]:
    """The two dictionaries of a file, "plain", "plus" or "full", for one of the tiny models."""
    return for_unet(peers.theirs(family).unet, kind, seed)


def for_unet(unet, kind: str, seed: int = 3) -> dict[str, dict[str, Tensor]]:
    """The same for a U-Net of diffusers."""
    width = unet.config.cross_attention_dim
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, scale: float = 0.3) -> Tensor:
        return scale * torch.randn(*shape, generator=generator)

    layers: dict[str, Tensor] = {}
    for number, name in enumerate(unet.attn_processors):
        if "attn2" in name:
            own = unet.get_submodule(name.removesuffix(".processor")).to_k.weight.shape[0]
            layers |= {f"{number}.to_{part}_ip.weight": draw(own, width) for part in "kv"}
    return {"image_proj": _projection(kind, width, draw), "ip_adapter": layers}


def _projection(kind: str, width: int, draw) -> dict[str, Tensor]:
    norm = {"weight": 1 + draw(width), "bias": draw(width)}
    if kind == "plain":
        found = {"proj.weight": draw(4 * width, PROJECTED), "proj.bias": draw(4 * width)}
        return found | {f"norm.{name}": tensor for name, tensor in norm.items()}
    if kind == "full":
        found = {"proj.0.weight": draw(HIDDEN, HIDDEN), "proj.0.bias": draw(HIDDEN)}
        found |= {"proj.2.weight": draw(width, HIDDEN), "proj.2.bias": draw(width)}
        return found | {f"proj.3.{name}": tensor for name, tensor in norm.items()}
    inner = 48
    found = {"latents": draw(1, 5, inner), "proj_in.weight": draw(inner, HIDDEN), "proj_in.bias": draw(inner)}
    found |= {"proj_out.weight": draw(width, inner), "proj_out.bias": draw(width)}
    found |= {f"norm_out.{name}": tensor for name, tensor in norm.items()}
    for layer in range(4):  # what diffusers takes for granted
        for name in ("0.norm1", "0.norm2", "1.0"):
            found |= {f"layers.{layer}.{name}.weight": 1 + draw(inner), f"layers.{layer}.{name}.bias": draw(inner)}
        found |= {
            f"layers.{layer}.0.to_q.weight": draw(128, inner),
            f"layers.{layer}.0.to_kv.weight": draw(256, inner),
            f"layers.{layer}.0.to_out.weight": draw(inner, 128),
            f"layers.{layer}.1.1.weight": draw(4 * inner, inner),
            f"layers.{layer}.1.3.weight": draw(inner, 4 * inner),
        }
    return found


def flat(parts: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    return {f"{part}.{name}": tensor for part, tensors in parts.items() for name, tensor in tensors.items()}


def saved(folder: Path, family: str, kind: str, seed: int = 3, suffix: str = ".safetensors") -> Path:
    """The file, beside the folder of its image encoder."""
    saved_encoder(folder)
    path = folder / f"ip-adapter-{kind}-{family}-{seed}{suffix}"
    if suffix == ".bin":
        torch.save(adapter(family, kind, seed), path)
    else:
        save_file(flat(adapter(family, kind, seed)), path)
    return path
