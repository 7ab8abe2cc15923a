"""Configurations: what published config.json files say, and what is refused."""

from __future__ import annotations

import pytest
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from hypothesis import given
from hypothesis import strategies as st

from latentdiff.diffusion.config import ScheduleConfig
from latentdiff.errors import ConfigError
from latentdiff.networks.config import UNetConfig, VAEConfig

SD21_UNET = {
    "_class_name": "UNet2DConditionModel",
    "_diffusers_version": "0.10.0.dev0",
    "attention_head_dim": [5, 10, 20, 20],
    "block_out_channels": [320, 640, 1280, 1280],
    "cross_attention_dim": 1024,
    "dual_cross_attention": False,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "sample_size": 96,
    "upcast_attention": True,
    "use_linear_projection": True,
}


def test_sd21_unet_is_read() -> None:
    config = UNetConfig.from_diffusers(SD21_UNET)
    assert config.num_heads == (5, 10, 20, 20)
    assert config.use_linear_projection and config.upcast_attention
    assert config.cross_attention_dim == 1024
    assert config.attention_levels == (True, True, True, False)


@st.composite
def unet_configs(draw) -> UNetConfig:
    levels = draw(st.integers(1, 4))
    heads = draw(st.lists(st.sampled_from([1, 2, 4]), min_size=levels, max_size=levels))
    told = [{}, {"num_class_embeds": 1000}, {"class_dim": 48}, {"added_dim": 68, "size_dim": 8}]
    return UNetConfig(
        in_channels=draw(st.sampled_from([4, 8, 9])),
        sample_size=draw(st.integers(1, 96)),
        block_out_channels=tuple(draw(st.sampled_from([32, 64])) for _ in range(levels)),
        layers_per_block=draw(st.integers(1, 2)),
        attention_levels=tuple(draw(st.booleans()) for _ in range(levels)),
        num_heads=tuple(heads),
        cross_attention_dim=draw(st.sampled_from([8, 24])),
        use_linear_projection=draw(st.booleans()),
        upcast_attention=draw(st.booleans()),
        only_cross_attention=tuple(draw(st.booleans()) for _ in range(levels)),
        **draw(st.sampled_from(told)),
    )


@given(unet_configs())
def test_unet_config_survives_the_public_format(config: UNetConfig) -> None:
    assert UNetConfig.from_diffusers(config.to_diffusers()) == config


def test_what_diffusers_writes_is_read_back() -> None:
    options = {"block_out_channels": (32, 32, 32, 32), "cross_attention_dim": 8}
    unet = UNet2DConditionModel(**options)
    assert UNetConfig.from_diffusers(unet.config) == UNetConfig.from_diffusers(options | {"sample_size": 64})
    vae = AutoencoderKL()
    assert VAEConfig.from_diffusers(vae.config).to_diffusers()["block_out_channels"] == [64]
    scheduler = DDIMScheduler(beta_schedule="scaled_linear", prediction_type="v_prediction")
    config = ScheduleConfig.from_diffusers(scheduler.config)
    assert ScheduleConfig.from_diffusers(DDIMScheduler(**_without_class(config.to_diffusers())).config) == config


def _without_class(config: dict) -> dict:
    return {key: value for key, value in config.items() if not key.startswith("_")}


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"addition_embed_type": "text_time"}, "addition_embed_type"),
        ({"transformer_layers_per_block": [1, 2, 10]}, "transformer_depth"),
        ({"class_embed_type": "timestep"}, "class_embed_type"),
        ({"class_embed_type": "projection"}, "class_embed_type"),
        (
            {"num_class_embeds": 9, "class_embed_type": "projection", "projection_class_embeddings_input_dim": 8},
            "several",
        ),
        ({"only_cross_attention": [True, False]}, "only_cross_attention"),
        ({"down_block_types": ["AttnDownBlock2D"] * 4}, "AttnDownBlock2D"),
        ({"up_block_types": ["UpBlock2D"] * 4}, "mirror"),
        ({"a_key_from_the_future": 3}, "a_key_from_the_future"),
        ({"block_out_channels": [320, 640, 1280, 1290]}, "1290"),
        ({"attention_head_dim": [5, 10]}, "num_heads"),
    ],
)
def test_other_architectures_are_refused(change: dict, word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        UNetConfig.from_diffusers(SD21_UNET | change)


@pytest.mark.parametrize(
    "change",
    [{"shift_factor": 0.1}, {"use_quant_conv": False}, {"down_block_types": ["DownBlock"]}, {"latents_mean": [0.0]}],
)
def test_other_autoencoders_are_refused(change: dict) -> None:
    with pytest.raises(ConfigError, match=next(iter(change))):
        VAEConfig.from_diffusers(change)


@pytest.mark.parametrize(
    "change",
    [{"beta_schedule": "sigmoid"}, {"prediction_type": "flow"}, {"timestep_spacing": "x"}, {"trained_betas": [0.1]}],
)
def test_other_schedules_are_refused(change: dict) -> None:
    with pytest.raises(ConfigError, match=next(iter(change))):
        ScheduleConfig.from_diffusers(change)
