"""Configuration of an original single file, read off the names and shapes of its tensors.

Heads, group counts and the VAE's scale leave no trace there. They are those of the published models: 8 heads
on every level where transformers are wrapped in convolutions (SD 1.x) and of the x4 upscaler, 64 channels a head where they
are wrapped in linear layers (SD 2.x and XL), 32 groups (or what divides smaller widths), 0.18215, XL's 0.13025 or the
upscaler's 0.08333.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from latentdiff.checkpoints.families import REFINER, SD, XL, Family, family_in, is_text
from latentdiff.checkpoints.index import LOW_RES_SCHEDULE, augmentations, model_index
from latentdiff.checkpoints.keymap import Shape
from latentdiff.diffusion.config import ScheduleConfig
from latentdiff.errors import CheckpointError
from latentdiff.networks.config import UNetConfig, VAEConfig
from latentdiff.networks.text_encoder import PROJECTED
from latentdiff.networks.text_encoders import SECOND

Shapes = Mapping[str, Shape]
_OPEN_CLIP_H_LAYERS = 24
_ADDED_OF_REFINER = 2560
_CONTEXT_OF_SD2 = 1024
_SIDE_OF_X4, _SCALE_OF_X4 = 128, 0.08333


def infer_configs(shapes: Shapes, prediction_type: str) -> dict[str, dict[str, Any]]:
    """The JSON files that a diffusers folder would hold: of U-Net, VAE, text encoder, scheduler and the whole.

    Args:
        shapes: of all tensors of the file, under their names in the file.
        prediction_type: "epsilon" or "v_prediction"; it tells the training size of SD 2.x.

    Raises:
        CheckpointError: tensors from which the sizes are read are missing.
    """
    family = family_in(shapes)
    by_part = {part: _below(shapes, prefix) for part, prefix in family.prefixes.items()}
    large = prediction_type == "v_prediction"
    try:
        texts = {part: infer_text_encoder(own, pooled=part == SECOND) for part, own in by_part.items() if is_text(part)}
        unet = infer_unet(
            by_part["unet"], large=large, family=family, pooled=texts.get(SECOND, {}).get("projection_dim")
        )
        vae = infer_vae(by_part["vae"])
        scale = _SCALE_OF_X4 if unet.num_class_embeds else family.scale
        vae = replace(vae, sample_size=vae.downscale * unet.sample_size, scaling_factor=scale)
    except (KeyError, IndexError, StopIteration) as error:
        raise CheckpointError(
            f"the file's sizes cannot be read: the tensor {error} is missing; probably the file is incomplete"
        ) from error
    scheduler = {**ScheduleConfig(prediction_type=prediction_type).to_diffusers(), **family.scheduler}
    if unet.num_class_embeds:
        scheduler |= {name: LOW_RES_SCHEDULE[name] for name in ("beta_start", "beta_end", "beta_schedule")}
    return {
        **augmentations(unet),
        "unet": unet.to_diffusers(),
        "vae": vae.to_diffusers(),
        **texts,
        "scheduler": scheduler,
        "model_index": model_index(unet, scheduler=scheduler["_class_name"], family=family),
    }


def infer_unet(shapes: Shapes, *, large: bool, family: Family | None = None, pooled: int | None = None) -> UNetConfig:
    """`large` U-Nets of SD 2.x were trained at 768 pixels and compute attention in float32 (with v-prediction).

    Args:
        family: None finds it.
        pooled: width of the pooled text; None is that of the published models.
    """
    levels: list[list[tuple[int, bool]]] = [[]]  # per level, per ResBlock: width, followed by attention?
    for index in range(1, _count(shapes, "input_blocks")):
        block = f"input_blocks.{index}"
        if f"{block}.0.op.weight" in shapes:
            levels.append([])
        else:
            width = shapes[f"{block}.0.out_layers.3.weight"][0]
            levels[-1].append((width, f"{block}.1.norm.weight" in shapes))
    widths = tuple(level[0][0] for level in levels)
    inner = [
        _count(shapes, f"input_blocks.{index}.1.transformer_blocks") for index in range(_count(shapes, "input_blocks"))
    ]
    per_level = len(levels[0]) + 1
    depth = [[d for d in inner[1 + n * per_level : (n + 1) * per_level] if d] for n in range(len(levels))]
    proj_in = next(shape for name, shape in shapes.items() if name.endswith(".1.proj_in.weight"))
    linear = len(proj_in) == 2
    labels = shapes.get("label_emb.weight", (None,))[0]
    to_k = next(shape for name, shape in shapes.items() if name.endswith(".attn2.to_k.weight"))
    added = shapes.get("label_emb.0.0.weight", (0, None))[1]
    if family is None:
        is_sd = added is None or to_k[1] == _CONTEXT_OF_SD2
        family = SD if is_sd else REFINER if added == _ADDED_OF_REFINER else XL
    vector, added = (added, None) if family is SD else (None, added)
    large = large and added is None and labels is None
    crossed = [
        any(
            shapes[f"input_blocks.{1 + n * (len(levels[0]) + 1) + block}.1.transformer_blocks.0.attn1.to_k.weight"][1]
            != width
            for block, (width, has_attention) in enumerate(level)
            if has_attention
        )
        for n, level in enumerate(levels)
    ]
    middle = _count(shapes, "middle_block.1.transformer_blocks")
    if not middle or any(len(set(depths)) > 1 for depths in depth):
        raise CheckpointError(
            "the U-Net has no transformers in its middle, or of several depths in a level, as SSD-1B and Vega: another "
            "architecture than Stable Diffusion 1.x, 2.x or XL"
        )
    return UNetConfig(
        in_channels=shapes["input_blocks.0.0.weight"][1],
        out_channels=shapes["out.2.weight"][0],
        sample_size=_SIDE_OF_X4 if labels else 96 if linear and large else family.side,
        block_out_channels=widths,
        layers_per_block=len(levels[0]),
        attention_levels=tuple(level[0][1] for level in levels),
        num_heads=tuple(max(width // 64, 1) if linear and not labels else 8 for width in widths),
        cross_attention_dim=to_k[1],
        use_linear_projection=linear,
        norm_num_groups=math.gcd(32, *widths),
        upcast_attention=linear and large,
        transformer_depth=(*(max(depths, default=1) for depths in depth[:-1]), middle),
        added_dim=added,
        num_class_embeds=labels,
        class_dim=vector,
        only_cross_attention=tuple(crossed),
        size_dim=256 if added is None or pooled is None else (added - pooled) // (5 if family is REFINER else 6),
    )


def infer_vae(shapes: Shapes) -> VAEConfig:
    """Sizes of the KL autoencoder."""
    levels = range(_count(shapes, "encoder.down"))
    return VAEConfig(
        in_channels=shapes["encoder.conv_in.weight"][1],
        out_channels=shapes["decoder.conv_out.weight"][0],
        latent_channels=shapes["post_quant_conv.weight"][1],
        block_out_channels=tuple(shapes[f"encoder.down.{level}.block.0.conv1.weight"][0] for level in levels),
        layers_per_block=_count(shapes, "encoder.down.0.block"),
    )


def infer_text_encoder(shapes: Shapes, *, pooled: bool = False) -> dict[str, Any]:
    """The CLIPTextConfig of the text encoder that lies below `cond_stage_model.`, say.

    Args:
        pooled: it is SDXL's second one, all of whose layers are used, and its projection.
    """
    if is_open_clip(shapes):
        vocabulary, width = shapes["model.token_embedding.weight"]
        positions = shapes["model.positional_embedding"][0]
        intermediate = shapes["model.transformer.resblocks.0.mlp.c_fc.weight"][0]
        layers, activation, projection = open_clip_layers(shapes), "gelu", 512
        if pooled:
            layers = _count(shapes, "model.transformer.resblocks")
            projection = shapes["model.text_projection"][1]
    else:
        body = {name.removeprefix("transformer.").removeprefix("text_model."): shapes[name] for name in shapes}
        vocabulary, width = body["embeddings.token_embedding.weight"]
        positions = body["embeddings.position_embedding.weight"][0]
        intermediate = body["encoder.layers.0.mlp.fc1.weight"][0]
        # OpenAI's encoders are the smaller ones; ViT-H/14 under transformers' names is OpenCLIP's.
        layers, activation, projection = _count(body, "encoder.layers"), "quick_gelu" if width <= 768 else "gelu", width
    return {
        "architectures": [PROJECTED if pooled else "CLIPTextModel"],
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "dropout": 0.0,
        "eos_token_id": 2,
        "hidden_act": activation,
        "hidden_size": width,
        "initializer_factor": 1.0,
        "initializer_range": 0.02,
        "intermediate_size": intermediate,
        "layer_norm_eps": 1e-05,
        "max_position_embeddings": positions,
        "model_type": "clip_text_model",
        "num_attention_heads": max(width // 64, 1),
        "num_hidden_layers": layers,
        "pad_token_id": 1,
        "projection_dim": projection,
        "vocab_size": vocabulary,
    }


def is_open_clip(shapes: Shapes) -> bool:
    """Whether the text encoder is OpenCLIP's (SD 2.x), not transformers' (SD 1.x)."""
    return "model.token_embedding.weight" in shapes


def open_clip_layers(shapes: Shapes) -> int:
    """How many layers of the tower are used: SD 2.x reads the last but one.

    A whole tower has its projection into CLIP's space; without it the last layer was already cut off, unless
    all 24 of ViT-H/14 are there.
    """
    layers = _count(shapes, "model.transformer.resblocks")
    whole = layers == _OPEN_CLIP_H_LAYERS or "model.text_projection" in shapes
    return layers - 1 if whole else layers


def _below(shapes: Shapes, prefix: str) -> dict[str, Shape]:
    return {name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)}


def _count(shapes: Shapes, prefix: str) -> int:
    """How many entries a numbered list of modules has."""
    number = re.compile(re.escape(prefix) + r"\.(\d+)\.")
    return len({match[1] for name in shapes if (match := number.match(name))})
