"""Key maps: inverse of one another on every configuration, and right about the published models."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from latentdiff.checkpoints import tables
from latentdiff.checkpoints.infer import infer_configs, infer_unet, infer_vae
from latentdiff.checkpoints.keymap import KeyMap, compare
from latentdiff.checkpoints.modules import expected_shapes
from latentdiff.checkpoints.original import layouts
from latentdiff.errors import CheckpointError
from latentdiff.networks.config import UNetConfig, VAEConfig
from tests.checkpoints import compvis

# As published beside the weights (unet/config.json, vae/config.json, text_encoder/config.json).
SD15_UNET = UNetConfig()
SD21_UNET = UNetConfig(
    sample_size=96,
    num_heads=(5, 10, 20, 20),
    cross_attention_dim=1024,
    use_linear_projection=True,
    upcast_attention=True,
)
SD15_TEXT = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
SD15_TEXT |= {"hidden_act": "quick_gelu", "vocab_size": 49408, "max_position_embeddings": 77, "projection_dim": 768}
SD21_TEXT = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16}
SD21_TEXT |= {"hidden_act": "gelu", "vocab_size": 49408, "max_position_embeddings": 77, "projection_dim": 512}

SD15 = compvis.unet() | compvis.vae() | compvis.clip()
SD21 = compvis.unet(context=1024, linear=True) | compvis.vae() | compvis.open_clip()


@st.composite
def unet_configs(draw: st.DrawFn) -> UNetConfig:
    levels = draw(st.integers(1, 5))
    entries = {"min_size": levels, "max_size": levels}
    widths = draw(st.lists(st.sampled_from((32, 64, 96)), **entries))
    attention = draw(st.lists(st.booleans(), **entries))
    linear = draw(st.booleans())
    return UNetConfig(
        in_channels=draw(st.sampled_from((4, 8, 9))),
        block_out_channels=tuple(widths),
        layers_per_block=draw(st.integers(1, 3)),
        attention_levels=tuple(attention),
        num_heads=tuple(max(width // 64, 1) if linear else 8 for width in widths),
        cross_attention_dim=draw(st.sampled_from((16, 768))),
        use_linear_projection=linear,
    )


@st.composite
def vae_configs(draw: st.DrawFn) -> VAEConfig:
    widths = draw(st.lists(st.sampled_from((32, 64, 96)), min_size=1, max_size=5))
    return VAEConfig(
        block_out_channels=tuple(widths),
        layers_per_block=draw(st.integers(1, 3)),
        latent_channels=draw(st.sampled_from((4, 8, 16))),
    )


def assert_bijective(names: list[str], key_map: KeyMap) -> None:
    theirs = [key_map.to_theirs(name) for name in names]
    assert None not in theirs
    assert len(set(theirs)) == len(names)
    assert [key_map.to_ours(name) for name in theirs] == names


@settings(max_examples=30)
@given(unet_configs())
def test_unet_map_has_an_inverse_for_every_configuration(config: UNetConfig):
    names = list(expected_shapes("unet", config.to_diffusers()))
    assert_bijective(names, tables.unet_map(config))


@settings(max_examples=30)
@given(vae_configs())
def test_vae_map_has_an_inverse_for_every_configuration(config: VAEConfig):
    names = list(expected_shapes("vae", config.to_diffusers()))
    assert_bijective(names, tables.vae_map(config))


@settings(max_examples=30)
@given(vae_configs())
def test_vae_configuration_is_read_off_the_shapes(config: VAEConfig):
    shapes = expected_shapes("vae", config.to_diffusers())
    key_map = tables.vae_map(config)
    assert infer_vae({key_map.to_theirs(name): shape for name, shape in shapes.items()}) == config


@settings(max_examples=30)
@given(unet_configs())
def test_unet_configuration_is_read_off_the_shapes(config: UNetConfig):
    shapes = expected_shapes("unet", config.to_diffusers())
    key_map = tables.unet_map(config)
    assert infer_unet({key_map.to_theirs(name): shape for name, shape in shapes.items()}, large=False) == config


@settings(max_examples=30)
@given(st.integers(1, 30), st.integers(1, 6))
def test_fused_attention_splits_and_joins_to_the_same_bits(layers: int, width: int):
    state = {}
    for layer in range(layers):
        name = f"text_model.encoder.layers.{layer}"
        for letter in "qkv":
            state[f"{name}.self_attn.{letter}_proj.weight"] = torch.randn(width, width)
            state[f"{name}.self_attn.{letter}_proj.bias"] = torch.randn(width)
        state[f"{name}.self_attn.out_proj.weight"] = torch.randn(width, width)
    joined = tables.to_open_clip(state)
    assert joined["text_model.encoder.layers.0.self_attn.in_proj_weight"].shape == (3 * width, width)
    assert not any("_proj." in name and ".out_proj." not in name for name in joined)
    again = tables.to_transformers(joined)
    assert again.keys() == state.keys()
    assert all(torch.equal(again[name], state[name]) for name in state)
    assert_bijective(list(joined), tables.open_clip_map(layers))


def test_a_table_without_inverse_is_refused():
    with pytest.raises(ValueError, match="once on either side"):
        KeyMap([("a", "x"), ("b", "x")])


def test_prefixes_end_at_dots():
    key_map = KeyMap([("down.1", "in.1"), ("down.1.conv", "in.9")])
    assert key_map.to_theirs("down.1.weight") == "in.1.weight"
    assert key_map.to_theirs("down.1.conv.weight") == "in.9.weight"
    assert key_map.to_theirs("down.11.weight") is None


def test_published_key_counts():
    """What people count in the published files: 686 U-Net, 248 VAE, 197 or 294 text encoder keys."""
    assert len(compvis.unet()) == 686
    assert len(compvis.vae()) == 248
    assert len(compvis.clip()) == 197
    assert len(compvis.open_clip()) == 294


def test_configuration_of_sd15_is_read_off_its_keys():
    found = infer_configs(SD15, "epsilon")
    assert UNetConfig.from_diffusers(found["unet"]) == SD15_UNET
    assert VAEConfig.from_diffusers(found["vae"]) == VAEConfig()
    assert SD15_TEXT.items() <= found["text_encoder"].items()


def test_configuration_of_sd21_is_read_off_its_keys():
    found = infer_configs(SD21, "v_prediction")
    assert UNetConfig.from_diffusers(found["unet"]) == SD21_UNET
    assert VAEConfig.from_diffusers(found["vae"]) == VAEConfig(sample_size=768)
    assert SD21_TEXT.items() <= found["text_encoder"].items()
    assert found["scheduler"]["prediction_type"] == "v_prediction"


@pytest.mark.parametrize("original", [SD15, SD21], ids=["sd15", "sd21"])
def test_tables_name_every_key_of_the_published_models(original: compvis.Shapes):
    configs = infer_configs(original, "epsilon")
    open_clip = original is SD21
    named: set[str] = set()
    for part, layout in layouts(configs, open_clip=open_clip).items():
        ours = {name: torch.empty(shape, device="meta") for name, shape in expected_shapes(part, configs[part]).items()}
        theirs = {layout.theirs(name): tensor for name, tensor in layout.to_theirs(ours).items()}
        assert all(tuple(tensor.shape) == original[name] for name, tensor in theirs.items())
        named |= theirs.keys()
    rest = set(original) - named
    if open_clip:
        unused = {name for name in original if "resblocks.23." in name or name.endswith(("projection", "logit_scale"))}
        assert rest == unused
    else:
        assert rest == {"cond_stage_model.transformer.text_model.embeddings.position_ids"}


def test_report_names_the_first_offenders_with_shapes_and_a_guess():
    expected = {f"layer.{i}": (2, 3) for i in range(9)}
    report = compare("U-Net", expected, {"layer.0": (2, 4), "other": (1,)})
    assert not report.fits
    with pytest.raises(CheckpointError) as error:
        report.raise_unless_fits("model.safetensors")
    message = str(error.value)
    assert "\n" not in message
    for part in ("U-Net of model.safetensors", "8 missing: layer.1 2x3", "and 3 more", "1 unexpected: other 1"):
        assert part in message
    assert "layer.0 (expected 2x3, found 2x4)" in message
    assert "another architecture" in message


def test_report_of_a_fit_is_silent():
    compare("VAE", {"a": (1,)}, {"a": (1,)}).raise_unless_fits("x")
