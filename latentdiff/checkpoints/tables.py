"""Name tables: the diffusers layout on the left, the original single-file layout (CompVis, Stability) on the right."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from latentdiff.checkpoints.keymap import KeyMap, expand
from latentdiff.networks.config import UNetConfig, VAEConfig

# --- U-Net ---

_UNET = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "mid_block.attentions.0": "middle_block.1",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_TOLD = {"linear_1": "0", "linear_2": "2"}
_UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def unet_map(config: UNetConfig) -> KeyMap:
    """The original numbers blocks through; diffusers counts levels and blocks within them.

    On the way down level l takes the inputs 1 + l (n + 1) to (l + 1)(n + 1), the last of them its downsampler;
    on the way up it takes the outputs l (n + 1) to l (n + 1) + n, the last of which ends with its upsampler.
    """
    return KeyMap(_unet_pairs(config))


def _unet_pairs(config: UNetConfig) -> Iterator[tuple[str, str]]:
    yield from _UNET.items()
    if config.num_class_embeds is not None:
        yield "class_embedding", "label_emb"
    else:
        yield from expand("class_embedding" if config.class_dim else "add_embedding", "label_emb.0", _TOLD)
    yield from expand("mid_block.resnets.0", "middle_block.0", _UNET_RESNET)
    yield from expand("mid_block.resnets.1", "middle_block.2", _UNET_RESNET)
    per_level = config.layers_per_block + 1
    last = len(config.block_out_channels) - 1
    for level, attention in enumerate(config.attention_levels):
        for block in range(config.layers_per_block):
            theirs = f"input_blocks.{1 + level * per_level + block}"
            yield from expand(f"down_blocks.{level}.resnets.{block}", f"{theirs}.0", _UNET_RESNET)
            if attention:
                yield f"down_blocks.{level}.attentions.{block}", f"{theirs}.1"
        if level < last:
            yield f"down_blocks.{level}.downsamplers.0.conv", f"input_blocks.{(level + 1) * per_level}.0.op"
    for level, attention in enumerate(reversed(config.attention_levels)):
        for block in range(per_level):
            theirs = f"output_blocks.{level * per_level + block}"
            yield from expand(f"up_blocks.{level}.resnets.{block}", f"{theirs}.0", _UNET_RESNET)
            if attention:
                yield f"up_blocks.{level}.attentions.{block}", f"{theirs}.1"
        if level < last:
            yield f"up_blocks.{level}.upsamplers.0.conv", f"{theirs}.{2 if attention else 1}.conv"


def control_map(config: UNetConfig, hint_levels: int) -> KeyMap:
    """A ControlNet, below `control_model.` in the original (Zhang et al. 2023): the U-Net's way down, the convolutions of
    the hint, and one for each output.

    Args:
        hint_levels: widths that the hint passes through.
    """
    outside = ("up_blocks.", "conv_norm_out", "conv_out")
    pairs = [pair for pair in _unet_pairs(config) if not pair[0].startswith(outside)]
    hint = ["conv_in", *(f"blocks.{index}" for index in range(2 * (hint_levels - 1))), "conv_out"]
    pairs += [(f"controlnet_cond_embedding.{ours}", f"input_hint_block.{2 * n}") for n, ours in enumerate(hint)]
    skips = len(config.block_out_channels) * (config.layers_per_block + 1)
    pairs += [(f"controlnet_down_blocks.{index}", f"zero_convs.{index}.0") for index in range(skips)]
    return KeyMap([*pairs, ("controlnet_mid_block", "middle_block_out.0")])


def ema_name(name: str) -> str:
    """The name of the averaged copy of `model.diffusion_model.*`: its dots are removed."""
    return "model_ema." + name.removeprefix("model.").replace(".", "")


# --- VAE ---

_VAE_RESNET = {name: name for name in ("norm1", "conv1", "norm2", "conv2")} | {"conv_shortcut": "nin_shortcut"}
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def vae_map(config: VAEConfig) -> KeyMap:
    """The original counts the decoder's levels from the finest, diffusers in the order of computation."""
    return KeyMap(_vae_pairs(config))


def _vae_pairs(config: VAEConfig) -> Iterator[tuple[str, str]]:
    for name in ("quant_conv", "post_quant_conv"):
        yield name, name
    last = len(config.block_out_channels) - 1
    for half in ("encoder", "decoder"):
        yield from expand(half, half, {"conv_in": "conv_in", "conv_norm_out": "norm_out", "conv_out": "conv_out"})
        yield from expand(f"{half}.mid_block.resnets.0", f"{half}.mid.block_1", _VAE_RESNET)
        yield from expand(f"{half}.mid_block.attentions.0", f"{half}.mid.attn_1", _VAE_ATTENTION)
        yield from expand(f"{half}.mid_block.resnets.1", f"{half}.mid.block_2", _VAE_RESNET)
    for level in range(last + 1):
        down, up = f"encoder.down_blocks.{level}", f"decoder.up_blocks.{level}"
        for block in range(config.layers_per_block):
            yield from expand(f"{down}.resnets.{block}", f"encoder.down.{level}.block.{block}", _VAE_RESNET)
        for block in range(config.layers_per_block + 1):
            yield from expand(f"{up}.resnets.{block}", f"decoder.up.{last - level}.block.{block}", _VAE_RESNET)
        if level < last:
            yield f"{down}.downsamplers.0.conv", f"encoder.down.{level}.downsample.conv"
            yield f"{up}.upsamplers.0.conv", f"decoder.up.{last - level}.upsample.conv"


def attention_to_linear(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The original computes the VAE's attention with 1x1 convolutions (C, C, 1, 1), diffusers with (C, C) matrices."""
    return {
        name: tensor.flatten(1) if _is_vae_attention(name) and tensor.ndim == 4 else tensor
        for name, tensor in tensors.items()
    }


def attention_to_convolution(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Inverse of `attention_to_linear`."""
    return {
        name: tensor[:, :, None, None] if _is_vae_attention(name) and tensor.ndim == 2 else tensor
        for name, tensor in tensors.items()
    }


def _is_vae_attention(name: str) -> bool:
    return ".attentions." in name and name.endswith(".weight")


# --- Text encoder ---

_OPEN_CLIP = {
    "text_model.embeddings.token_embedding": "model.token_embedding",
    "text_model.embeddings.position_embedding.weight": "model.positional_embedding",
    "text_model.final_layer_norm": "model.ln_final",
}
_OPEN_CLIP_LAYER = {
    "layer_norm1": "ln_1",
    "self_attn.in_proj_weight": "attn.in_proj_weight",
    "self_attn.in_proj_bias": "attn.in_proj_bias",
    "self_attn.out_proj": "attn.out_proj",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
_PROJECTION = "text_projection.weight"
_POSITION_IDS = ("text_model.embeddings.position_ids", "transformer.text_model.embeddings.position_ids")


def clip_map() -> KeyMap:
    """SD 1.x holds transformers' CLIPTextModel as it is, and so does SDXL its first."""
    return KeyMap([("text_model", "transformer.text_model")])


def open_clip_map(layers: int, *, projected: bool = False) -> KeyMap:
    """SD 2.x and SDXL hold OpenCLIP's text tower, queries, keys and values in one matrix (see `to_transformers`).

    Args:
        projected: SDXL's, whose projection is used.
    """
    pairs = [*_OPEN_CLIP.items(), _POSITION_IDS]
    pairs += [(_PROJECTION, "model.text_projection")] if projected else []
    for layer in range(layers):
        pairs += open_clip_layer(f"text_model.encoder.layers.{layer}", f"model.transformer.resblocks.{layer}")
    return KeyMap(pairs)


def open_clip_layer(ours: str, theirs: str) -> Iterator[tuple[str, str]]:
    """Pairs for one layer of a tower of OpenCLIP, of text or images, whose layers in transformers are alike."""
    return expand(ours, theirs, _OPEN_CLIP_LAYER)


def to_transformers(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """in_proj_weight (3C, C) and in_proj_bias (3C,) -> q_proj, k_proj, v_proj, in this order; the projection, which
    multiplies from the other side, is transposed."""
    split: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        module, _, leaf = name.rpartition(".in_proj_")
        if module:
            for letter, third in zip("qkv", tensor.tensor_split(3), strict=True):
                split[f"{module}.{letter}_proj.{leaf}"] = third
        else:
            split[name] = tensor.T if name == _PROJECTION else tensor
    return split


def to_open_clip(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Inverse of `to_transformers`."""
    joined: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if ".self_attn.q_proj." in name:
            thirds = [tensors[name.replace(".q_proj.", f".{letter}_proj.")] for letter in "qkv"]
            joined[name.replace(".q_proj.", ".in_proj_")] = torch.cat(thirds)
        elif ".self_attn.k_proj." not in name and ".self_attn.v_proj." not in name:
            joined[name] = tensor.T if name == _PROJECTION else tensor
    return joined
