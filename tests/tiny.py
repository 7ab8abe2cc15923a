"""Tiny models with random weights in the real layouts, built and saved by diffusers and transformers.

They are the peers of the parity tests: the same tensors go through their code and through ours. Every key
pattern of the real models occurs in them (four U-Net levels, the last without attention; down- and
upsamplers; shortcut convolutions), only the widths are small. Normalisation weights and biases are random
too, so that a swapped or forgotten tensor shows in the output.

    sd1_folder(tmp)      SD 1.x: convolution projections, 8 heads on every level, eps prediction
    sd2_folder(tmp)      SD 2.x: linear projections, heads per level, penultimate text layer, v-prediction
    inpaint_folder(tmp)  SD 1.x with a 9-channel U-Net
    depth_folder(tmp)    SD 2.x with a 5-channel U-Net and a DPT that sees depths
    unclip_folder(tmp)   SD 2.x that is told what CLIP sees in an image
    x4_folder(tmp)       the x4 upscaler: a small image, labels, text in place of self-attention, a VAE of factor 4
    pix2pix_folder(tmp)  SD 1.x with an 8-channel U-Net, for instructions
    xl_folder(tmp)       SDXL: three levels of other depths, two text encoders, pooled text and sizes
    refiner_folder(tmp)  its refiner: the second text encoder alone, an aesthetic score
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

WORDS = tuple("a photo of the cat dog fox rocket two red blue background on left right to".split())
CONTEXT_LENGTH = 77
CHANNELS = (16, 32, 32, 32)
CROSS_ATTENTION_DIM = 32


# --- Tokenizer ------------------------------------------------------------------------------------


def byte_symbols() -> list[str]:
    """The 256 printable stand-ins of bytes that GPT-2 and CLIP vocabularies use, in their order."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [256 + i for i in range(256 - len(printable))]
    return [chr(code) for code in printable + others]


def tokenizer_vocabulary(words: tuple[str, ...] = WORDS) -> tuple[dict[str, int], list[str]]:
    """A CLIP vocabulary (token -> id) and its merges, in which every one of `words` is one token."""
    tokens = byte_symbols()
    tokens += [symbol + "</w>" for symbol in tokens]
    merges: list[str] = []
    for word in words:
        pieces = [*word[:-1], word[-1] + "</w>"]
        while len(pieces) > 1:
            left, right, *rest = pieces
            if f"{left} {right}" not in merges:
                merges.append(f"{left} {right}")
                tokens.append(left + right)
            pieces = [left + right, *rest]
    tokens = [*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"]
    return {token: index for index, token in enumerate(tokens)}, merges


def save_tokenizer(folder: Path, *, pad_token: str = "<|endoftext|>", max_length: int = CONTEXT_LENGTH) -> int:
    """Write the four files of a CLIP tokenizer as published folders have them; returns its size."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary, merges = tokenizer_vocabulary()
    special = {
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "pad_token": pad_token,
    }
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": max_length, "do_lower_case": True}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")
    (folder / "special_tokens_map.json").write_text(json.dumps(special), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, **special}), encoding="utf-8")
    return len(vocabulary)


def tokenizer(folder: Path, **kwargs):
    """Save a tiny tokenizer into `folder` and open it with transformers."""
    from transformers import CLIPTokenizer

    save_tokenizer(folder, **kwargs)
    return CLIPTokenizer.from_pretrained(folder)


# --- Modules of the peers -------------------------------------------------------------------------


@torch.no_grad()
def randomize(module: nn.Module, seed: int) -> nn.Module:
    """Add seeded noise to every weight, so that no norm is the identity and no bias zero; sets eval mode."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return module.eval()


def unet(seed: int = 1, **overrides):
    """A diffusers UNet2DConditionModel, by default as SD 1.x configures it (8 heads on every level)."""
    from diffusers import UNet2DConditionModel

    config = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": CHANNELS,
        "layers_per_block": 2,
        "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        "attention_head_dim": 8,
        "cross_attention_dim": CROSS_ATTENTION_DIM,
        "norm_num_groups": 8,
    }
    torch.manual_seed(seed)
    return randomize(UNet2DConditionModel(**{**config, **overrides}), seed)


def sd2_unet(seed: int = 1, **overrides):
    """As SD 2.x configures it: linear projections, and heads per level (8 or more channels a head here)."""
    return unet(seed, **{"use_linear_projection": True, "attention_head_dim": [2, 4, 4, 4], **overrides})


def vae(seed: int = 2, **overrides):
    """A diffusers AutoencoderKL that shrinks by 8, as in SD 1.x and 2.x."""
    from diffusers import AutoencoderKL

    config = {
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": 4,
        "block_out_channels": CHANNELS,
        "layers_per_block": 2,
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "norm_num_groups": 8,
        "sample_size": 64,
        "scaling_factor": 0.18215,
    }
    torch.manual_seed(seed)
    return randomize(AutoencoderKL(**{**config, **overrides}), seed)


def text_encoder(seed: int = 3, **overrides):
    """A transformers CLIPTextModel as in SD 1.x (quick GELU, 3 layers here) for the tiny tokenizer."""
    from transformers import CLIPTextConfig, CLIPTextModel

    vocabulary, _ = tokenizer_vocabulary()
    config = {
        "vocab_size": len(vocabulary),
        "hidden_size": CROSS_ATTENTION_DIM,
        "intermediate_size": 4 * CROSS_ATTENTION_DIM,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": CONTEXT_LENGTH,
        "hidden_act": "quick_gelu",
        "projection_dim": CROSS_ATTENTION_DIM,
        "bos_token_id": vocabulary["<|startoftext|>"],
        "eos_token_id": vocabulary["<|endoftext|>"],
        "pad_token_id": vocabulary["<|endoftext|>"],
    }
    torch.manual_seed(seed)
    return randomize(CLIPTextModel(CLIPTextConfig(**{**config, **overrides})), seed)


def sd2_text_encoder(seed: int = 3, **overrides):
    """As in the SD 2.x folders: GELU, the original tower's last layer cut off (2 layers here)."""
    return text_encoder(seed, **{"hidden_act": "gelu", "num_hidden_layers": 2, **overrides})


# --- Pipelines and folders ------------------------------------------------------------------------

BETAS = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
}


def pipeline(unet_, vae_, text_encoder_, tokenizer_, scheduler):
    """A diffusers StableDiffusionPipeline without safety checker."""
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline(
        unet=unet_,
        vae=vae_,
        text_encoder=text_encoder_,
        tokenizer=tokenizer_,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sd1_pipeline(tmp: Path, scheduler=None, **unet_overrides):
    """SD 1.x in small, with the PNDM scheduler that its folders name or another. `tmp` takes the tokenizer's files."""
    from diffusers import PNDMScheduler

    if scheduler is None:
        scheduler = PNDMScheduler(**BETAS, skip_prk_steps=True, steps_offset=1, set_alpha_to_one=False)
    words = tokenizer(Path(tmp) / "tokenizer-files")
    return pipeline(unet(**unet_overrides), vae(), text_encoder(), words, scheduler)


def sd2_pipeline(tmp: Path, prediction_type: str = "v_prediction", **unet_overrides):
    """SD 2.x in small, with the DDIM scheduler of its folders. `tmp` takes the tokenizer's files."""
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(
        **BETAS, prediction_type=prediction_type, steps_offset=1, set_alpha_to_one=False, clip_sample=False
    )
    words = tokenizer(Path(tmp) / "tokenizer-files", pad_token="!")
    return pipeline(sd2_unet(**unet_overrides), vae(), sd2_text_encoder(), words, scheduler)


def save_real_layout(pipe, folder: Path, tokenizer_files: Path, **save_options) -> Path:
    """`save_pretrained`, with what today's transformers writes differently put as published folders have it.

    Those carry `text_model.` before every text encoder key, and vocab.json + merges.txt, not tokenizer.json.
    """
    pipe.save_pretrained(folder, **save_options)
    for file in (folder / "text_encoder").glob("*.safetensors"):
        tensors = load_file(file)
        prefixed = {f"text_model.{key.removeprefix('text_model.')}": tensor for key, tensor in tensors.items()}
        save_file(prefixed, file, metadata={"format": "pt"})
    shutil.rmtree(folder / "tokenizer")
    shutil.copytree(tokenizer_files, folder / "tokenizer")
    return folder


def sd1_folder(tmp: Path, scheduler=None, **save_options) -> Path:
    """Save a tiny SD 1.x pipeline as `tmp/sd1`; `save_options` go to `save_pretrained`."""
    return save_real_layout(
        sd1_pipeline(tmp, scheduler), Path(tmp) / "sd1", Path(tmp) / "tokenizer-files", **save_options
    )


def sd2_folder(tmp: Path, prediction_type: str = "v_prediction", **save_options) -> Path:
    """Save a tiny SD 2.x pipeline as `tmp/sd2`."""
    pipe = sd2_pipeline(tmp, prediction_type)
    return save_real_layout(pipe, Path(tmp) / "sd2", Path(tmp) / "tokenizer-files", **save_options)


def inpaint_folder(tmp: Path, scheduler=None, **save_options) -> Path:
    """Save a tiny inpainting pipeline (9 input channels: latents, mask, masked latents) as `tmp/inpaint`."""
    pipe = sd1_pipeline(tmp, scheduler, in_channels=9)
    return save_real_layout(pipe, Path(tmp) / "inpaint", Path(tmp) / "tokenizer-files", **save_options)


def pix2pix_folder(tmp: Path, scheduler=None, **save_options) -> Path:
    """Save a tiny InstructPix2Pix (8 input channels: latents, and those of an image) as `tmp/pix2pix`."""
    from diffusers import StableDiffusionInstructPix2PixPipeline

    parts = sd1_pipeline(tmp, scheduler, in_channels=8).components
    pipe = StableDiffusionInstructPix2PixPipeline(**parts, requires_safety_checker=False)
    return save_real_layout(pipe, Path(tmp) / "pix2pix", Path(tmp) / "tokenizer-files", **save_options)


def depth_estimator(seed: int = 5):
    """A tiny DPT as transformers has it."""
    from transformers import DPTConfig, DPTForDepthEstimation

    config = DPTConfig(
        hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=8,
        backbone_out_indices=[0, 1, 2, 3], neck_hidden_sizes=[8, 8, 8, 8], fusion_hidden_size=8, is_hybrid=False,
    )  # fmt: skip
    torch.manual_seed(seed)
    return randomize(DPTForDepthEstimation(config), seed)


def depth_folder(tmp: Path, scheduler=None, **save_options) -> Path:
    """Save a tiny SD 2 that sees depths (5 input channels: latents, and a map) as `tmp/depth`."""
    from diffusers import StableDiffusionDepth2ImgPipeline
    from transformers import DPTImageProcessorPil

    parts = sd2_pipeline(tmp, "epsilon", in_channels=5).components
    pipe = StableDiffusionDepth2ImgPipeline(
        **{name: parts[name] for name in ("vae", "text_encoder", "tokenizer", "unet")},
        scheduler=scheduler or parts["scheduler"],
        depth_estimator=depth_estimator(),
        feature_extractor=DPTImageProcessorPil(size={"height": 32, "width": 32}),
    )
    return save_real_layout(pipe, Path(tmp) / "depth", Path(tmp) / "tokenizer-files", **save_options)


def x4_folder(tmp: Path, scheduler=None, **save_options) -> Path:
    """Save a tiny x4 upscaler as `tmp/x4`."""
    from diffusers import DDIMScheduler, DDPMScheduler, StableDiffusionUpscalePipeline

    betas = {**BETAS, "beta_start": 0.0001, "beta_end": 0.02}
    ddim = DDIMScheduler(
        **betas, prediction_type="v_prediction", steps_offset=1, set_alpha_to_one=False, clip_sample=False
    )
    network = unet(
        in_channels=7, num_class_embeds=1000, use_linear_projection=True, sample_size=16, block_out_channels=(16, 32, 32, 64),
        only_cross_attention=(True, True, True, False), attention_head_dim=8,
        down_block_types=("DownBlock2D",) + ("CrossAttnDownBlock2D",) * 3,
        up_block_types=("CrossAttnUpBlock2D",) * 3 + ("UpBlock2D",), cross_attention_dim=CROSS_ATTENTION_DIM,
    )  # fmt: skip
    autoencoder = vae(
        block_out_channels=CHANNELS[:3], scaling_factor=0.08333, down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
    )  # fmt: skip
    pipe = StableDiffusionUpscalePipeline(
        vae=autoencoder,
        text_encoder=sd2_text_encoder(),
        tokenizer=tokenizer(Path(tmp) / "tokenizer-files", pad_token="!"),
        unet=network,
        low_res_scheduler=DDPMScheduler(**betas),
        scheduler=ddim,
    )
    return save_real_layout(pipe, Path(tmp) / "x4", Path(tmp) / "tokenizer-files", **save_options)


EMBEDDED = 24  # width of what CLIP sees


def clip_vision(seed: int = 6):
    """A tiny image encoder of CLIP, as ViT-L: quick GELU, 64 channels a head."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    config = CLIPVisionConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=1, image_size=32, patch_size=8,
        projection_dim=EMBEDDED, hidden_act="quick_gelu",
    )  # fmt: skip
    torch.manual_seed(seed)
    return randomize(CLIPVisionModelWithProjection(config), seed)


def unclip_folder(tmp: Path, scheduler=None, **save_options) -> Path:
    """Save a tiny unCLIP of SD 2.1 as `tmp/unclip`."""
    from diffusers import DDPMScheduler, StableUnCLIPImg2ImgPipeline
    from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer
    from transformers import CLIPImageProcessor

    told = {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 2 * EMBEDDED}
    parts = sd2_pipeline(tmp, **told).components
    pipe = StableUnCLIPImg2ImgPipeline(
        **{name: parts[name] for name in ("vae", "text_encoder", "tokenizer", "unet", "scheduler")},
        image_encoder=clip_vision(),
        image_normalizer=randomize(StableUnCLIPImageNormalizer(EMBEDDED), 7),
        image_noising_scheduler=DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
        feature_extractor=CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
    )
    folder = save_real_layout(pipe, Path(tmp) / "unclip", Path(tmp) / "tokenizer-files", **save_options)
    for file in (folder / "image_encoder").glob("*.safetensors"):
        tensors = load_file(file)
        prefixed = {
            key if key.startswith(("vision_model.", "visual_projection.")) else f"vision_model.{key}": tensor
            for key, tensor in tensors.items()
        }
        save_file(prefixed, file, metadata={"format": "pt"})
    return folder


# --- SDXL -----------------------------------------------------------------------------------------

SECOND_WIDTH, POOLED_WIDTH, SIZE_DIM = 24, 20, 8


def xl_unet(seed: int = 1, **overrides):
    """As SDXL configures it: no attention on the first level, deeper transformers below, told pooled text and sizes."""
    config = {
        "block_out_channels": (16, 32, 32),
        "down_block_types": ("DownBlock2D",) + ("CrossAttnDownBlock2D",) * 2,
        "up_block_types": ("CrossAttnUpBlock2D",) * 2 + ("UpBlock2D",),
        "attention_head_dim": [2, 4, 4],
        "transformer_layers_per_block": [1, 2, 3],
        "use_linear_projection": True,
        "cross_attention_dim": CROSS_ATTENTION_DIM + SECOND_WIDTH,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": SIZE_DIM,
        "projection_class_embeddings_input_dim": POOLED_WIDTH + 6 * SIZE_DIM,
    }
    return unet(seed, **{**config, **overrides})


def refiner_unet(seed: int = 1, **overrides):
    """As SDXL's refiner configures it: attention on the levels between, one depth, told five numbers."""
    config = {
        "block_out_channels": (16, 32, 32, 32),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": [2, 4, 4, 4],
        "transformer_layers_per_block": 2,
        "cross_attention_dim": SECOND_WIDTH,
        "projection_class_embeddings_input_dim": POOLED_WIDTH + 5 * SIZE_DIM,
    }
    return xl_unet(seed, **{**config, **overrides})


def second_text_encoder(seed: int = 4, **overrides):
    """OpenCLIP's of SDXL as transformers has it: GELU, a projection, end marks found as the highest number."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    config = text_encoder().config.to_dict() | {
        "hidden_size": SECOND_WIDTH,
        "intermediate_size": 4 * SECOND_WIDTH,
        "num_hidden_layers": 4,
        "hidden_act": "gelu",
        "projection_dim": POOLED_WIDTH,
        "eos_token_id": 2,
        "pad_token_id": 1,
    }
    torch.manual_seed(seed)
    return randomize(CLIPTextModelWithProjection(CLIPTextConfig(**{**config, **overrides})), seed)


def xl_vae(**overrides):
    """SDXL's VAE: another scale."""
    return vae(**{"scaling_factor": 0.13025, **overrides})


def xl_pipeline(tmp: Path, scheduler=None, *, zeros: bool = True, **unet_overrides):
    """SDXL base in small. `tmp` takes the tokenizers' files."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    return StableDiffusionXLPipeline(
        vae=xl_vae(),
        text_encoder=text_encoder(),
        text_encoder_2=second_text_encoder(),
        tokenizer=tokenizer(Path(tmp) / "tokenizer-files"),
        tokenizer_2=tokenizer(Path(tmp) / "tokenizer-2-files", pad_token="!"),
        unet=xl_unet(**unet_overrides),
        scheduler=scheduler or EulerDiscreteScheduler(**BETAS, steps_offset=1, timestep_spacing="leading"),
        force_zeros_for_empty_prompt=zeros,
        add_watermarker=False,
    )


def refiner_pipeline(tmp: Path):
    """SDXL's refiner in small."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLImg2ImgPipeline

    return StableDiffusionXLImg2ImgPipeline(
        vae=xl_vae(),
        text_encoder=None,
        text_encoder_2=second_text_encoder(),
        tokenizer=None,
        tokenizer_2=tokenizer(Path(tmp) / "tokenizer-2-files", pad_token="!"),
        unet=refiner_unet(),
        scheduler=EulerDiscreteScheduler(**BETAS, steps_offset=1, timestep_spacing="leading"),
        requires_aesthetics_score=True,
        force_zeros_for_empty_prompt=False,
        add_watermarker=False,
    )


def save_xl(pipe, folder: Path, tmp: Path, **save_options) -> Path:
    """`save_pretrained` with names and tokenizers as published folders have them."""
    pipe.save_pretrained(folder, **save_options)
    for file in folder.glob("text_encoder*/*.safetensors"):
        keys = load_file(file)
        kept = {
            key if key.startswith("text_projection") else f"text_model.{key.removeprefix('text_model.')}": tensor
            for key, tensor in keys.items()
        }
        save_file(kept, file, metadata={"format": "pt"})
    for name in ("tokenizer", "tokenizer_2"):
        if (folder / name).exists():
            shutil.rmtree(folder / name)
            shutil.copytree(Path(tmp) / f"{name.replace('_', '-')}-files", folder / name)
    return folder


def xl_folder(tmp: Path, scheduler=None, *, zeros: bool = True, **save_options) -> Path:
    """Save a tiny SDXL base as `tmp/xl`."""
    return save_xl(xl_pipeline(tmp, scheduler, zeros=zeros), Path(tmp) / "xl", Path(tmp), **save_options)


def xl_inpaint_folder(tmp: Path, scheduler=None) -> Path:
    """Save a tiny SDXL for inpainting (9 input channels) as `tmp/xl-inpaint`."""
    return save_xl(xl_pipeline(tmp, scheduler, in_channels=9), Path(tmp) / "xl-inpaint", Path(tmp))


def refiner_folder(tmp: Path) -> Path:
    """Save a tiny SDXL refiner as `tmp/refiner`."""
    return save_xl(refiner_pipeline(tmp), Path(tmp) / "refiner", Path(tmp))
