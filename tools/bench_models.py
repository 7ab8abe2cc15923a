"""Models with random weights for `bench.py`: speed and memory do not depend on what the weights say.

python tools/bench_models.py FOLDER --precision bf16        Stable Diffusion 1.5's shape, as diffusers saves it
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


@dataclass(frozen=True)
class Shape:
    """Sizes of the model that is raced."""

    unet_widths: tuple[int, ...]
    vae_widths: tuple[int, ...]
    text_width: int
    text_layers: int
    vocabulary: int
    groups: int
    latent_size: int  # latent height and width; an image is 8 times that


SHAPES = {
    "sd15": Shape((320, 640, 1280, 1280), (128, 256, 512, 512), 768, 12, 49408, 32, 64),
    "tiny": Shape((32, 64, 64, 64), (32, 32, 32, 32), 32, 2, 1000, 8, 8),
}


def unet(shape: Shape) -> Any:
    """A diffusers U-Net of Stable Diffusion 1.5's architecture."""
    import torch
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=shape.latent_size,
        block_out_channels=shape.unet_widths,
        cross_attention_dim=shape.text_width,
        attention_head_dim=8,
        norm_num_groups=shape.groups,
    ).eval()


def vae(shape: Shape) -> Any:
    """A diffusers AutoencoderKL of Stable Diffusion 1.5's architecture."""
    import torch
    from diffusers import AutoencoderKL

    torch.manual_seed(1)
    return AutoencoderKL(
        sample_size=8 * shape.latent_size,
        block_out_channels=shape.vae_widths,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        norm_num_groups=shape.groups,
    ).eval()


def save_model(shape: Shape, folder: Path, precision: str = "fp32") -> None:
    """Write a whole model of this shape as diffusers saves it, its weights in the number format `precision`."""
    import torch
    from diffusers import DDIMScheduler, StableDiffusionPipeline
    from transformers import CLIPTextConfig, CLIPTextModel

    from latentdiff.diffusion.config import ScheduleConfig
    from tests.tiny import tokenizer

    dtype = getattr(torch, DTYPES[precision])
    words = tokenizer(folder / "words")
    text = CLIPTextConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.text_width,
        intermediate_size=4 * shape.text_width,
        num_hidden_layers=shape.text_layers,
        num_attention_heads=shape.text_width // min(64, shape.text_width),
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
    )
    StableDiffusionPipeline(
        vae=vae(shape).to(dtype), unet=unet(shape).to(dtype), text_encoder=CLIPTextModel(text).to(dtype), tokenizer=words,
        scheduler=DDIMScheduler.from_config(ScheduleConfig().to_diffusers()),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(folder)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="sd15")
    parser.add_argument("--precision", choices=DTYPES, default="fp32", help="of the weights in the files")
    args = parser.parse_args()
    save_model(SHAPES[args.shape], args.folder, args.precision)


if __name__ == "__main__":
    main()
