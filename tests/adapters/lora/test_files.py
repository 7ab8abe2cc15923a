"""Names, metadata, and files that are damaged, foreign or made for another model."""

from __future__ import annotations

import json
import re

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from latentdiff.adapters.lora.loading import load_lora
from latentdiff.adapters.lora.metadata import lora_metadata
from latentdiff.adapters.lora.names import all_names, kohya_name, read_key
from latentdiff.adapters.lora.reading import read_lora
from latentdiff.adapters.lora.saving import save_lora
from latentdiff.adapters.lora.spec import LoRASpec, adaptable
from latentdiff.checkpoints.tables import unet_map
from latentdiff.errors import CheckpointError, LatentDiffError, UsageError
from latentdiff.networks.config import UNetConfig
from latentdiff.networks.text_encoder import TextEncoder
from latentdiff.networks.unet import UNet
from tests import peers
from tests.adapters.lora.conftest import make
from tests.checkpoints.test_keymap import SD15_TEXT, SD15_UNET, SD21_TEXT, SD21_UNET

DOWN = "unet.down_blocks.0.attentions.0.transformer_blocks.0"
# As they stand in published files.
PUBLISHED = {
    "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0": f"{DOWN}.attn1.to_out.0",
    "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_ff_net_0_proj": f"{DOWN}.ff.net.0.proj",
    "lora_unet_mid_block_attentions_0_proj_in": "unet.mid_block.attentions.0.proj_in",
    "lora_unet_down_blocks_1_resnets_0_conv_shortcut": "unet.down_blocks.1.resnets.0.conv_shortcut",
    "lora_unet_down_blocks_0_downsamplers_0_conv": "unet.down_blocks.0.downsamplers.0.conv",
    "lora_unet_down_blocks_1_resnets_0_time_emb_proj": "unet.down_blocks.1.resnets.0.time_emb_proj",
    "lora_unet_conv_in": "unet.conv_in",
    "lora_unet_time_embedding_linear_1": "unet.time_embedding.linear_1",
    "lora_te_text_model_encoder_layers_11_mlp_fc1": "text_encoder.text_model.encoder.layers.11.mlp.fc1",
    "lora_te1_text_model_encoder_layers_0_self_attn_q_proj": "text_encoder.text_model.encoder.layers.0.self_attn.q_proj",
    "lora_unet_input_blocks_1_1_transformer_blocks_0_attn2_to_k": f"{DOWN}.attn2.to_k",
    "lora_unet_input_blocks_3_0_op": "unet.down_blocks.0.downsamplers.0.conv",
    "lora_unet_input_blocks_4_0_in_layers_2": "unet.down_blocks.1.resnets.0.conv1",
    "lora_unet_input_blocks_4_0_emb_layers_1": "unet.down_blocks.1.resnets.0.time_emb_proj",
    "lora_unet_middle_block_1_proj_out": "unet.mid_block.attentions.0.proj_out",
    "lora_unet_output_blocks_5_2_conv": "unet.up_blocks.1.upsamplers.0.conv",
    "lora_unet_input_blocks_0_0": "unet.conv_in",
    "lora_unet_out_2": "unet.conv_out",
    "lora_unet_time_embed_0": "unet.time_embedding.linear_1",
    "text_encoder.encoder.layers.3.self_attn.v_proj": "text_encoder.text_model.encoder.layers.3.self_attn.v_proj",
    "mid_block.attentions.0.transformer_blocks.0.attn1.to_q": "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q",
    "base_model.model.conv_in": "unet.conv_in",
}  # fmt: skip
KEYS = {
    "lora_unet_conv_in.lora_down.weight": ("lora_unet_conv_in", "down"),
    "lora_unet_conv_in.alpha": ("lora_unet_conv_in", "alpha"),
    "lora_unet_conv_in.hada_w1_a": ("lora_unet_conv_in", "hada_w1_a"),
    "unet.a.attn1.to_q.lora_A.weight": ("unet.a.attn1.to_q", "down"),
    "unet.a.attn1.to_q.lora_B.default.weight": ("unet.a.attn1.to_q", "up"),
    "unet.a.attn1.to_q.lora.up.weight": ("unet.a.attn1.to_q", "up"),
    "unet.a.attn1.processor.to_out_lora.down.weight": ("unet.a.attn1.to_out.0", "down"),
    "unet.a.attn1.processor.to_k_lora.up.weight": ("unet.a.attn1.to_k", "up"),
    "text_encoder.a.self_attn.to_out_lora.up.weight": ("text_encoder.a.self_attn.out_proj", "up"),
    "text_encoder.a.self_attn.q_proj.lora_linear_layer.down.weight": ("text_encoder.a.self_attn.q_proj", "down"),
}


@pytest.fixture(scope="module")
def sd15():
    with torch.device("meta"):
        return UNet(SD15_UNET), TextEncoder(SD15_TEXT)


@pytest.mark.parametrize(("key", "expected"), KEYS.items())
def test_tensor_names(key, expected):
    assert read_key(key) == expected


def test_published_names(sd15):
    known = all_names(dict(adaptable(*sd15)), SD15_UNET)
    assert {name: known.get(name) for name in PUBLISHED} == PUBLISHED


def test_no_two_layers_share_a_name(sd15):
    names = dict(adaptable(*sd15))
    assert len({kohya_name(name) for name in names}) == len(names)
    known = all_names(names, SD15_UNET)
    assert all(known[kohya_name(name)] == name == known[name] for name in names)


@pytest.mark.parametrize(("unet", "text", "expected"), [(SD15_UNET, SD15_TEXT, 264), (SD21_UNET, SD21_TEXT, 330)])
def test_what_kohya_trains_is_found_whole(unet, text, expected):
    """Its tools adapt these layers, of SD 1.x 264: 192 in the U-Net, and 72 in the text encoder."""
    with torch.device("meta"):
        model = UNet(unet), TextEncoder(text)
    targets = ("attention", "feed_forward", "projections", "text_encoder", "text_encoder_mlp")
    assert len(LoRASpec(targets=targets).select(*model)) == expected


def test_a_whole_lora_of_sd15(sd15, tmp_path):
    targets = ("attention", "feed_forward", "projections", "text_encoder", "text_encoder_mlp")
    tensors = {}
    for name, (target, _) in LoRASpec(targets=targets).select(*sd15).items():
        stem, shape = kohya_name(name), target.weight.shape
        tensors[f"{stem}.lora_down.weight"] = torch.zeros(1, *shape[1:])
        tensors[f"{stem}.lora_up.weight"] = torch.zeros(shape[0], 1, *[1] * (len(shape) - 2))
        tensors[f"{stem}.alpha"] = torch.tensor(1.0)
    save_file(tensors, tmp_path / "a.safetensors")
    _, report = load_lora(tmp_path / "a.safetensors", *sd15)
    assert str(report) == "matched 264 of 264 layers (kohya names)"


@pytest.mark.parametrize("dialect", ["kohya", "peft"])
def test_saved_is_loaded(ours, dialect, tmp_path):
    lora = make(ours)
    save_lora(lora, tmp_path / "a.safetensors", {"note": "hello"}, dialect=dialect)
    again, report = load_lora(tmp_path / "a.safetensors", ours.unet, ours.text_encoder)
    assert str(report) == f"matched {len(lora.layers)} of {len(lora.layers)} layers ({dialect} names)"
    assert list(again.layers) == list(lora.layers) and again.metadata["note"] == "hello"
    for name, layer in lora.layers.items():
        assert torch.equal(again.layers[name].weight_change(), layer.weight_change())
    if dialect == "kohya":
        assert all(torch.equal(p, q) for p, q in zip(lora.parameters(), again.parameters(), strict=True))


def test_names_of_the_original_layout(ours, tmp_path):
    lora = make(ours)
    save_lora(lora, tmp_path / "a.safetensors")
    table = unet_map(ours.unet.config)
    theirs = {
        kohya_name(name): "lora_unet_" + table.to_theirs(name.removeprefix("unet.")).replace(".", "_")
        for name in lora.layers
        if name.startswith("unet.")
    }
    renamed = {}
    for key, tensor in load_file(tmp_path / "a.safetensors").items():
        stem, dot, role = key.partition(".")
        renamed[theirs.get(stem, stem) + dot + role] = tensor
    assert any("input_blocks_1_1_transformer_blocks_0" in key for key in renamed)
    save_file(renamed, tmp_path / "b.safetensors")
    again, report = load_lora(tmp_path / "b.safetensors", ours.unet, ours.text_encoder)
    assert report.matched == report.total == len(lora.layers)
    assert all(torch.equal(p, q) for p, q in zip(lora.parameters(), again.parameters(), strict=True))


def test_kohya_file(ours, tmp_path):
    save_lora(make(ours, ("attention", "convolutions")), tmp_path / "a.safetensors")
    tensors = load_file(tmp_path / "a.safetensors")
    stem = "lora_unet_down_blocks_0_resnets_0_conv1"
    assert tensors[f"{stem}.alpha"].shape == () and tensors[f"{stem}.alpha"] == 2
    assert tensors[f"{stem}.lora_down.weight"].shape == (4, 16, 3, 3)
    assert tensors[f"{stem}.lora_up.weight"].shape == (16, 4, 1, 1)
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        about = file.metadata()
    assert about["ss_network_module"] == "networks.lora"
    assert (about["ss_network_dim"], about["ss_network_alpha"]) == ("4", "2.0")


def test_metadata():
    about = lora_metadata(
        SD21_UNET,
        "v_prediction",
        model="sd21",
        model_hash="ab" * 32,
        title="fox",
        training={"images": 24, "data": "foxes"},
    )
    assert about["ss_base_model_version"] == "sd_v2_v" and about["ss_v2"] == "True"
    assert about["modelspec.architecture"] == "stable-diffusion-v2-768-v/lora"
    assert about["ss_num_train_images"] == "24" and about["ss_sd_model_name"] == "sd21"
    own = json.loads(about["latentdiff"])
    assert own["model_hash"] == "ab" * 32 and own["training"] == {"images": 24, "data": "foxes"}
    assert lora_metadata(SD15_UNET, "epsilon")["ss_base_model_version"] == "sd_v1"
    assert "ss_v2" not in lora_metadata(UNetConfig(block_out_channels=(64, 128, 192, 192)), "epsilon")
    assert all(isinstance(value, str) for value in about.values())


# --- What does not fit ----------------------------------------------------------------------------


@pytest.fixture
def pipe():
    return peers.ours("sd1")


@pytest.fixture
def tensors(pipe, tmp_path):
    save_lora(make(pipe, ("attention",)), tmp_path / "good.safetensors")
    return load_file(tmp_path / "good.safetensors")


def load(pipe, tensors, tmp_path, **options):
    save_file(tensors, tmp_path / "bad.safetensors")
    return load_lora(tmp_path / "bad.safetensors", pipe.unet, pipe.text_encoder, **options)


STEM = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {f"{STEM}.lora_down.weight": torch.zeros(4, 768)},
            r"to_k \(down: expected 4x32, found 4x768\).*Probably it is damaged",
        ),
        ({f"{STEM}.lora_up.weight": torch.zeros(32, 2)}, r"up: expected 32x4, found 32x2"),
        ({f"{STEM}.lora_up.weight": torch.full((32, 4), torch.nan)}, "NaN"),
        ({f"{STEM}.alpha": torch.ones(2)}, "alpha: expected one number, found 2"),
        ({f"{STEM}.lora_down.weight": torch.zeros(())}, "found one number"),
        ({f"{STEM}.dora_scale": torch.ones(31)}, "DoRA: expected 32 lengths, found 31"),
        ({f"{STEM}.diff": torch.ones(32)}, "full difference: expected a change of 32x32, found 32"),
        ({f"{STEM}.bias_values": torch.ones(32)}, "unknown tensor bias_values"),
        (
            {"lora_unet_elsewhere.lora_down.weight": torch.ones(2, 2)},
            r"matched 128 of 129 .*lora_unet_elsewhere \(the model has no",
        ),
        ({"lora_unet_x.hada_w1_a": torch.ones(2, 2)}, "lora_unet_x"),
    ],
)
def test_one_wrong_layer(pipe, tensors, tmp_path, change, message):
    with pytest.raises(CheckpointError) as error:
        load(pipe, tensors | change, tmp_path)
    assert re.search(message, str(error.value)) and "\n" not in str(error.value)
    lora, report = load(pipe, tensors | change, tmp_path, allow_partial=True)
    assert len(report.problems) == report.total - report.matched == 1
    assert len(lora.layers) == report.matched


def test_missing_half(pipe, tensors, tmp_path):
    del tensors[f"{STEM}.lora_up.weight"]
    with pytest.raises(CheckpointError, match="its up matrix is missing"):
        load(pipe, tensors, tmp_path)


def test_many_wrong_layers_are_counted(pipe, tensors, tmp_path):
    other = {name.replace("lora_unet_", "lora_unet_x"): tensor for name, tensor in tensors.items()}
    with pytest.raises(CheckpointError, match=r"matched 0 of 128 layers.* and 123 more"):
        load(pipe, other, tmp_path, allow_partial=True)


@pytest.mark.parametrize(
    ("name", "width", "family"),
    [
        ("lora_unet_input_blocks_4_1_transformer_blocks_1_attn2_to_k", 2048, "Stable Diffusion XL"),
        ("lora_te2_text_model_encoder_layers_0_mlp_fc1", 1280, "Stable Diffusion XL"),
        ("lora_unet_double_blocks_0_img_attn_proj", 3072, "Flux"),
        ("transformer.transformer_blocks.0.attn.to_q", 1536, "Stable Diffusion 3"),
        ("lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k", 1024, "Stable Diffusion 2.x"),
        ("lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k", 96, "a model of text width 96"),
    ],
)
def test_loras_of_other_models(pipe, tmp_path, name, width, family):
    tensors = {f"{name}.lora_down.weight": torch.zeros(4, width), f"{name}.lora_up.weight": torch.zeros(64, 4)}
    with pytest.raises(CheckpointError, match=f"was made for {family}, this model is a model of text width 32"):
        load(pipe, tensors, tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "empty"), (b"<html>", "HTML page"), (b"version https://git-lfs", "LFS"), (b"\x80\x02trash", "damaged")],
)
def test_foreign_files(pipe, tmp_path, content, message):
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        load_lora(tmp_path / "a.safetensors", pipe.unet, pipe.text_encoder)


def test_models_are_no_loras(tmp_path):
    with pytest.raises(CheckpointError, match=r"expected a LoRA, found .* U-Net \(diffusers layout\)"):
        read_lora(peers.folder("sd1") / "unet/diffusion_pytorch_model.safetensors")
    with pytest.raises(CheckpointError, match="there is no LoRA file"):
        read_lora(tmp_path / "none.safetensors")
    with pytest.raises(CheckpointError, match="found none: name the file"):
        read_lora(tmp_path)


def test_pickles_of_tensors_are_read(pipe, tensors, tmp_path):
    torch.save(tensors, tmp_path / "a.pt")
    _, report = load_lora(tmp_path / "a.pt", pipe.unet, pipe.text_encoder)
    assert report.matched == report.total == 128


def test_wrong_targets_for_saving(pipe, tmp_path):
    lora = make(pipe, ("attention",))
    with pytest.raises(UsageError, match="ends in .safetensors"):
        save_lora(lora, tmp_path / "a.pt")
    with pytest.raises(UsageError, match="unknown LoRA dialect 'loha'"):
        save_lora(lora, tmp_path / "a.safetensors", dialect="loha")
    (tmp_path / "file").touch()
    with pytest.raises(LatentDiffError, match="cannot write"):
        save_lora(lora, tmp_path / "file/a.safetensors")


def test_loading_twice_and_unloading_nothing(pipe, tmp_path):
    file = tmp_path / "a.safetensors"
    save_lora(make(pipe, ("attention",)), file)
    with pytest.raises(UsageError, match="finite"):
        pipe.load_lora(file, scale=float("nan"))
    pipe.load_lora(file)
    with pytest.raises(UsageError, match="loaded already"):
        pipe.load_lora(file)
    with pytest.raises(UsageError, match="no LoRA called 'b'"):
        pipe.unload_lora("b")
    pipe.unload_lora(str(file))
    pipe.unload_lora()
