"""Original files of models that see more than a prompt, at their real sizes, against the published configurations."""

from __future__ import annotations

import pytest
import torch

from latentdiff.checkpoints import unclip
from latentdiff.checkpoints.architecture import identify
from latentdiff.checkpoints.image_encoder import empty_image_encoder
from latentdiff.checkpoints.infer import infer_configs
from latentdiff.checkpoints.modules import expected_shapes, parse_config
from latentdiff.checkpoints.original import layouts
from latentdiff.networks.config import UNetConfig
from latentdiff.networks.image_encoder import ImageEncoderConfig
from latentdiff.networks.inputs import DEPTH, INSTRUCTIONS, UPSCALING, VARIATIONS, inputs_of
from tests.checkpoints import compvis

# unet/config.json of stabilityai/stable-diffusion-x4-upscaler, without what never varies.
X4_UNET = {
    "attention_head_dim": 8, "block_out_channels": [256, 512, 512, 1024], "cross_attention_dim": 1024, "in_channels": 7,
    "down_block_types": ["DownBlock2D"] + ["CrossAttnDownBlock2D"] * 3, "num_class_embeds": 1000, "out_channels": 4,
    "up_block_types": ["CrossAttnUpBlock2D"] * 3 + ["UpBlock2D"], "only_cross_attention": [True, True, True, False],
    "sample_size": 128, "use_linear_projection": True, "dual_cross_attention": False, "layers_per_block": 2,
}  # fmt: skip


def fits(shapes: compvis.Shapes, configs: dict) -> None:
    """Every tensor of the U-Net and the VAE has its place, and the other way round."""
    for part, layout in layouts(configs, open_clip=True).items():
        if part not in ("unet", "vae"):
            continue
        theirs = {layout.theirs(name): shape for name, shape in expected_shapes(part, configs[part]).items()}
        own = {name: shape for name, shape in shapes.items() if name.startswith(layout.prefix)}
        assert theirs.keys() == own.keys()
        assert all(torch.Size(shape).numel() == torch.Size(own[name]).numel() for name, shape in theirs.items())


def test_the_x4_upscaler():
    shapes = compvis.x4_upscaler()
    assert identify(shapes).family == "Stable Diffusion 2.x upscaling by 4, a size of its own"
    configs = infer_configs(shapes, "v_prediction")
    found, published = parse_config("unet", configs["unet"]), UNetConfig.from_diffusers(X4_UNET)
    # The first level has no attention, whose kind leaves no trace.
    assert found.only_cross_attention[1:] == published.only_cross_attention[1:]
    assert vars(found) | {"only_cross_attention": ()} == vars(published) | {"only_cross_attention": ()}
    vae = configs["vae"]
    assert (vae["scaling_factor"], vae["block_out_channels"]) == (0.08333, [128, 256, 512])
    assert inputs_of(found, vae["latent_channels"]) == UPSCALING
    schedules = configs["scheduler"], configs["low_res_scheduler"]
    assert all(
        (one["beta_start"], one["beta_end"], one["beta_schedule"]) == (1e-4, 0.02, "scaled_linear") for one in schedules
    )
    assert configs["model_index"]["low_res_scheduler"] == ["diffusers", "DDPMScheduler"]
    fits(shapes, configs)


@pytest.mark.parametrize(
    ("width", "layers", "projection", "heads", "activation"),
    [(1280, 32, 1024, 16, "gelu"), (1024, 24, 768, 16, "quick_gelu")],
)
def test_unclip(width, layers, projection, heads, activation):
    """ViT-H of OpenCLIP and ViT-L of OpenAI, as their config.json in transformers has them."""
    shapes = compvis.unclip(width, layers, projection)
    assert identify(shapes).family == "Stable Diffusion 2.x for variations of images"
    configs = infer_configs(shapes, "v_prediction")
    unet = parse_config("unet", configs["unet"])
    assert (unet.class_dim, unet.sample_size, unet.upcast_attention) == (2 * projection, 96, True)
    assert inputs_of(unet, 4) == VARIATIONS
    assert configs["image_noising_scheduler"]["beta_schedule"] == "squaredcos_cap_v2"
    fits(shapes, configs)
    extras = {name: torch.empty(shape, device="meta") for name, shape in shapes.items() if name.startswith("embedder.")}
    beside = unclip.taken_from(extras, configs)
    config = ImageEncoderConfig.of(configs["image_encoder"])
    assert config == ImageEncoderConfig(
        hidden_size=width, intermediate_size=4 * width, projection_dim=projection, num_hidden_layers=layers,
        num_attention_heads=heads, image_size=224, patch_size=14, hidden_act=activation,
    )  # fmt: skip
    expected = {name: tensor.shape for name, tensor in empty_image_encoder(config).state_dict().items()}
    assert {name: tensor.shape for name, tensor in beside["image_encoder"].items()} == expected
    assert sorted(extras) == ["embedder.model.logit_scale", "embedder.model.token_embedding.weight"]


@pytest.mark.parametrize(
    ("channels", "context", "kind", "family"),
    [
        (5, 1024, DEPTH, "Stable Diffusion 2.x conditioned on depth"),
        (8, 768, INSTRUCTIONS, "Stable Diffusion 1.x conditioned on an image"),
    ],
)
def test_depth_and_instructions(channels, context, kind, family):
    is_second = context == 1024
    shapes = compvis.unet(context=context, linear=is_second, in_channels=channels) | compvis.vae()
    shapes |= compvis.open_clip() if is_second else compvis.clip()
    if is_second:
        shapes |= {f"depth_model.model.pretrained.model.blocks.{n}.attn.qkv.weight": (2304, 768) for n in range(12)}
    assert identify(shapes).family == family and not identify(shapes).strays
    configs = infer_configs(shapes, "epsilon")
    assert inputs_of(parse_config("unet", configs["unet"]), 4) == kind
    fits(shapes, configs)
