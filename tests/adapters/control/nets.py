"""Tiny ControlNets of diffusers for the tiny models, with nothing left at zero."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from diffusers import ControlNetModel, ControlNetUnionModel
from PIL import Image

from tests import peers, tiny
from tests.tasks.images import an_image

# Options of a short image that everything asked for shows in.
OURS = {
    "steps": 4,
    "guidance_scale": 5.0,
    "negative_prompt": "red fox",
    "sampler": "ddim",
    "progress": False,
    "seed": 7,
}


@cache
def theirs(family: str = "sd1", seed: int = 5, pools: bool = False) -> ControlNetModel:
    """A ControlNet beside the tiny model's U-Net, all of its weights with noise: its convolutions begin at zero."""
    config = peers.theirs(family).unet.config
    names = ("down_block_types", "block_out_channels", "attention_head_dim", "cross_attention_dim", "norm_num_groups")
    told = ("addition_embed_type", "addition_time_embed_dim", "projection_class_embeddings_input_dim")
    same = {name: config[name] for name in (*names, *told, "layers_per_block", "use_linear_projection")}
    same["transformer_layers_per_block"] = config["transformer_layers_per_block"]
    torch.manual_seed(seed)
    return tiny.randomize(ControlNetModel(**same, global_pool_conditions=pools), seed)


@cache
def union(modes: int = 8, layers: int = 1) -> ControlNetUnionModel:
    """For several kinds of hints, beside the tiny SDXL."""
    config = theirs("xl").config
    own = {
        name: config[name]
        for name in config
        if not name.startswith(("_", "global", "mid_block_type", "conditioning_ch"))
    }
    width = own["block_out_channels"][0]
    more = {"num_control_type": modes, "num_trans_layer": layers, "num_trans_channel": width, "num_proj_channel": width}
    torch.manual_seed(6)
    return tiny.randomize(ControlNetUnionModel(**own, **more), 6)


def saved(folder: Path, family: str = "sd1", seed: int = 5, pools: bool = False, **options) -> Path:
    """The same as a folder in the diffusers layout."""
    place = folder / f"{family}-{seed}-{pools}"
    if not place.exists():
        theirs(family, seed, pools).save_pretrained(place, **options)
    return place


def hint(seed: int = 1, size: tuple[int, int] = (64, 64)) -> Image.Image:
    """A colourful image to follow."""
    return an_image(*size, seed)
