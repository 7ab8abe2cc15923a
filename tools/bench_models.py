"""Models with random weights for `bench.py`: speed and memory do not depend on what the weights say.

python tools/bench_models.py FOLDER --precision bf16        Stable Diffusion 1.5's shape, as diffusers saves it
python tools/bench_models.py FOLDER --shape sdxl            Stable Diffusion XL's
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
    depth: tuple[int, ...] = ()  # of SDXL: transformer blocks by level
    second: tuple[int, int, int] = (0, 0, 0)  # and its second text encoder's width, layers, pooled width


SHAPES = {
    "sd15": Shape((320, 640, 1280, 1280), (128, 256, 512, 512), 768, 12, 49408, 32, 64),
    "tiny": Shape((32, 64, 64, 64), (32, 32, 32, 32), 32, 2, 1000, 8, 8),
    "sdxl": Shape((320, 640, 1280), (128, 256, 512, 512), 768, 12, 49408, 32, 128, (1, 2, 10), (1280, 32, 1280)),
    "tiny-sdxl": Shape((64, 64, 64), (32, 32, 32, 32), 32, 2, 1000, 8, 8, (1, 1, 2), (64, 2, 32)),
}
_SIZES, _SIZE_WIDTH = 6, 256  # that SDXL is told, and the width of each


def unet(shape: Shape) -> Any:
    """A diffusers U-Net of Stable Diffusion 1.5's architecture, or of XL's."""
    import torch
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    if shape.depth:
        return UNet2DConditionModel(
            sample_size=shape.latent_size,
            block_out_channels=shape.unet_widths,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=shape.depth,
            attention_head_dim=[width // 64 for width in shape.unet_widths],
            use_linear_projection=True,
            cross_attention_dim=shape.text_width + shape.second[0],
            addition_embed_type="text_time",
            addition_time_embed_dim=_SIZE_WIDTH,
            projection_class_embeddings_input_dim=shape.second[2] + _SIZES * _SIZE_WIDTH,
            norm_num_groups=shape.groups,
        ).eval()
    return UNet2DConditionModel(
        sample_size=shape.latent_size,
        block_out_channels=shape.unet_widths,
        cross_attention_dim=shape.text_width,
        attention_head_dim=8,
        norm_num_groups=shape.groups,
    ).eval()


def vae(shape: Shape) -> Any:
    """A diffusers AutoencoderKL of Stable Diffusion's architecture."""
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
        scaling_factor=0.13025 if shape.depth else 0.18215,
    ).eval()


def save_model(shape: Shape, folder: Path, precision: str = "fp32") -> None:
    """Write a whole model of this shape as diffusers saves it, its weights in the number format `precision`."""
    import torch
    from diffusers import DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

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
    parts: dict[str, Any] = {
        "vae": vae(shape).to(dtype), "unet": unet(shape).to(dtype), "text_encoder": CLIPTextModel(text).to(dtype),
        "tokenizer": words, "scheduler": DDIMScheduler.from_config(ScheduleConfig().to_diffusers()),
    }  # fmt: skip
    if not shape.depth:
        own = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        StableDiffusionPipeline(**parts, **own).save_pretrained(folder)
        return
    width, layers, pooled = shape.second
    own = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers, "projection_dim": pooled}
    heads = {"num_attention_heads": width // min(64, width), "hidden_act": "gelu"}
    second = CLIPTextModelWithProjection(CLIPTextConfig(**{**text.to_dict(), **own, **heads})).to(dtype)
    other = tokenizer(folder / "other-words", pad_token="!")
    StableDiffusionXLPipeline(
        **parts, text_encoder_2=second, tokenizer_2=other, add_watermarker=False
    ).save_pretrained(folder)


def save_control(folder: Path) -> None:
    """Write a ControlNet for the model in `folder` as `controlnet/` in it, in the number format of its weights."""
    import torch
    from diffusers import ControlNetModel, UNet2DConditionModel

    torch.manual_seed(3)
    model = UNet2DConditionModel.from_pretrained(folder, subfolder="unet", torch_dtype="auto")
    network = ControlNetModel.from_unet(model)
    for conv in (*network.controlnet_down_blocks, network.controlnet_mid_block):
        torch.nn.init.normal_(conv.weight, std=0.01)  # so that the outputs of the contenders can be compared
    network.to(model.dtype).save_pretrained(folder / "controlnet")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="sd15")
    parser.add_argument("--precision", choices=DTYPES, default="fp32", help="of the weights in the files")
    parser.add_argument("--control", action="store_true", help="write a ControlNet beside the model that is there instead")
    args = parser.parse_args()
    if args.control:
        save_control(args.folder)
        return
    save_model(SHAPES[args.shape], args.folder, args.precision)


if __name__ == "__main__":
    main()
