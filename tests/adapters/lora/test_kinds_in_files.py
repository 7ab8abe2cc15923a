"""Files of all kinds and dialects, on whole models: the right layers change, as they do in PEFT."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from latentdiff.adapters.lora.adapter import merge
from latentdiff.adapters.lora.loading import load_lora
from latentdiff.adapters.lora.reading import read_lora
from latentdiff.adapters.lora.saving import save_lora
from latentdiff.adapters.lora.strength import Strength
from latentdiff.checkpoints.inspection import inspect
from latentdiff.errors import CheckpointError, UsageError
from tests import peers
from tests.adapters.lora.conftest import our_outputs, their_outputs

ATTENTION = "down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
CONVOLUTION = "down_blocks_0_resnets_0_conv1"


@pytest.fixture
def ours():
    return peers.ours("sd1")


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return 0.3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def kinds() -> dict[str, dict[str, torch.Tensor]]:
    """One layer of each kind, by kohya's names."""
    q, conv, te = f"lora_unet_{ATTENTION}", f"lora_unet_{CONVOLUTION}", "lora_te_text_model_encoder_layers_0_mlp_fc1"
    pair = {f"{q}.lora_down.weight": drawn(4, 16), f"{q}.lora_up.weight": drawn(16, 4), f"{q}.alpha": torch.tensor(2.0)}
    return {
        "LoRA": pair,
        "DoRA": {**pair, f"{q}.dora_scale": 1 + drawn(16, 1).abs()},
        "LoRA with a middle matrix": {
            f"{conv}.lora_down.weight": drawn(4, 16, 1, 1), f"{conv}.lora_mid.weight": drawn(4, 4, 3, 3),
            f"{conv}.lora_up.weight": drawn(16, 4, 1, 1),
        },
        "LoHa": {
            f"{q}.hada_w1_a": drawn(16, 4), f"{q}.hada_w1_b": drawn(4, 16), f"{q}.hada_w2_a": drawn(16, 4, seed=1),
            f"{q}.hada_w2_b": drawn(4, 16, seed=1), f"{q}.alpha": torch.tensor(1.0),
        },
        "LoKr": {f"{q}.lokr_w1": drawn(4, 4), f"{q}.lokr_w2": drawn(4, 4, seed=1)},
        "OFT": {f"{q}.oft_blocks": drawn(4, 4, 4), f"{q}.alpha": torch.tensor(0.0)},
        "IA3": {f"{q}.weight": drawn(16), f"{q}.on_input": torch.tensor(False)},
        "GLoRA": {f"{q}.a1.weight": drawn(16, 2), f"{q}.a2.weight": drawn(2, 16), f"{q}.b1.weight": drawn(16, 2, seed=1),
                  f"{q}.b2.weight": drawn(2, 16, seed=1)},
        "norm difference": {"lora_unet_down_blocks_0_attentions_0_norm.w_norm": drawn(16),
                            "lora_unet_down_blocks_0_attentions_0_norm.b_norm": drawn(16, seed=1)},
        "full difference + bias difference": {f"{te}.diff": drawn(128, 32), f"{te}.diff_b": drawn(128)},
    }  # fmt: skip


@pytest.mark.parametrize("kind", kinds())
def test_every_kind_acts_merges_and_is_named(ours, tmp_path, kind):
    file = tmp_path / "a.safetensors"
    save_file(kinds()[kind], file)
    assert list(read_lora(file).kinds) == [kind]
    shown = inspect(file)
    assert shown.kind.startswith("LoRA") and set(re.split(r" \+ | with ", kind)[0].split()) & set(str(shown).split())
    plain = our_outputs(ours)
    report = ours.load_lora(file, 0.7)
    assert (report.matched, report.total) == (1, 1) and (kind == "LoRA" or kind in str(report))
    attached = our_outputs(ours)
    assert max((a - b).abs().max() for a, b in zip(attached, plain, strict=True)) > 1e-4
    ours.unload_lora()
    assert all(map(torch.equal, plain, our_outputs(ours)))
    lora, _ = load_lora(file, ours.unet, ours.text_encoder)
    save_lora(lora, tmp_path / "again.safetensors")
    again = load_file(tmp_path / "again.safetensors")
    assert all(torch.equal(again[name], tensor) for name, tensor in kinds()[kind].items())
    merge([(lora, 0.7)])
    for a, b in zip(attached, our_outputs(ours), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


RENAMED = {
    "lycoris": lambda name: name.replace("lora_unet_", "lycoris_").replace("lora_te_", "lycoris_"),
    "original": lambda name: name.replace(
        f"lora_unet_{ATTENTION}", "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q"
    ).replace(f"lora_unet_{CONVOLUTION}", "diffusion_model.input_blocks.1.0.in_layers.2"),
    "peft": lambda name: name.replace(
        f"lora_unet_{ATTENTION}", "base_model.model.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    ),
}


@pytest.mark.parametrize(
    ("dialect", "kind"),
    [("lycoris", "LoHa"), ("lycoris", "norm difference"), ("lycoris", "full difference + bias difference"),
     ("original", "LoRA"), ("original", "DoRA"), ("original", "LoRA with a middle matrix"), ("original", "LoKr"),
     ("peft", "LoHa"), ("peft", "LoKr")],
)  # fmt: skip
def test_other_names_of_the_same(ours, tmp_path, dialect, kind):
    save_file(kinds()[kind], tmp_path / "kohya.safetensors")
    save_file({RENAMED[dialect](n): t for n, t in kinds()[kind].items()}, tmp_path / "other.safetensors")
    found = []
    for name in ("kohya", "other"):
        lora, report = load_lora(tmp_path / f"{name}.safetensors", ours.unet, ours.text_encoder)
        assert report.matched == report.total == 1
        found.append([(target, leaf, change) for target, leaf, change in lora.changes()])
    assert report.dialect == dialect
    for (a, b, c), (x, y, z) in zip(*found, strict=True):
        assert a is x and b == y and torch.equal(c, z)


def test_strength_by_part_and_block(ours, tmp_path):
    tensors = kinds()["LoRA"] | kinds()["full difference + bias difference"] | kinds()["LoRA with a middle matrix"]
    save_file(tensors, tmp_path / "a.safetensors")
    lora, _ = load_lora(tmp_path / "a.safetensors", ours.unet, ours.text_encoder)
    whole = {(target, leaf): change for target, leaf, change in lora.changes()}
    blocks = (0.5, *([0.0] * 25))
    for target, leaf, change in lora.changes(Strength(2.0, 3.0, blocks)):
        inside = any(target is module for module in ours.unet.modules())
        torch.testing.assert_close(change, (0.0 if inside else 1.5) * whole[target, leaf])
    ours.load_lora(tmp_path / "a.safetensors", "unet=0.8,te=0.4")
    assert ours.adaptations()[0]["scale"] == "unet=0.8,te=0.4"
    with pytest.raises(UsageError, match="expected a strength"):
        ours.load_lora(tmp_path / "a.safetensors", "0,8", "b")


def test_bundled_words_come_along(ours, tmp_path):
    word = {"bundle_emb.<teapot>.string_to_param.*": drawn(2, 32)}
    save_file(kinds()["LoRA"] | word, tmp_path / "a.safetensors")
    report = ours.load_lora(tmp_path / "a.safetensors")
    assert report.matched == report.total == 1 and report.words == ("<teapot>",) and "<teapot>" in str(report)
    assert len(ours.tokenizer("<teapot>", add_special_tokens=False)["input_ids"]) == 1
    assert len(ours.adaptations()) == 1
    ours.unload_lora(str(tmp_path / "a.safetensors"))
    assert len(ours.tokenizer("<teapot>", add_special_tokens=False)["input_ids"]) > 1 and ours.adaptations() == []


@pytest.mark.parametrize(
    ("name", "message"),
    [("lambda_layer", "T-LoRA, whose file does not hold"), ("boft_R", r"BOFT \(PEFT\), which is not supported")],
)
def test_kinds_that_cannot_be_used_are_named(ours, tmp_path, name, message):
    tensors = kinds()["norm difference"] | {f"lora_unet_{ATTENTION}.{name}": drawn(1, 4, 4)}
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=f"matched 1 of 2 layers.*{message}.*--allow-partial loads what fits"):
        ours.load_lora(tmp_path / "a.safetensors")
    report = ours.load_lora(tmp_path / "a.safetensors", allow_partial=True)
    assert "matched 1 of 2 layers" in str(report) and "left out" in str(report)


def peft_configs():
    import peft

    linear = ["to_q", "to_k", "ff.net.2"]
    both = [*linear, "conv1", "proj_in"]
    return {
        "dora": peft.LoraConfig(r=4, lora_alpha=3, target_modules=both, use_dora=True),
        "bias": peft.LoraConfig(r=4, lora_alpha=3, target_modules=["to_out.0", "conv1"], lora_bias=True),
        "loha": peft.LoHaConfig(r=4, alpha=3, target_modules=both),
        "loha-tucker": peft.LoHaConfig(r=4, alpha=3, target_modules=["conv1"], use_effective_conv2d=True),
        "lokr": peft.LoKrConfig(r=2, alpha=3, target_modules=both, decompose_both=True, decompose_factor=4),
        "lokr-whole": peft.LoKrConfig(r=16, alpha=3, target_modules=linear, decompose_factor=4),
        "oft": peft.OFTConfig(oft_block_size=4, r=0, target_modules=linear),
        "oft-exact": peft.OFTConfig(oft_block_size=4, r=0, target_modules=linear, use_cayley_neumann=False),
        "oft-shared": peft.OFTConfig(oft_block_size=4, r=0, target_modules=linear, block_share=True),
        "ia3": peft.IA3Config(target_modules=["to_k", "ff.net.2", "to_out.0"], feedforward_modules=["ff.net.2"]),
    }


@pytest.mark.parametrize("name", ["dora", "bias", "loha", "loha-tucker", "lokr", "lokr-whole", "oft", "oft-exact",
                                  "oft-shared", "ia3"])  # fmt: skip
def test_what_peft_writes(ours, tmp_path, name):
    from diffusers import UNet2DConditionModel
    from peft import get_peft_model

    theirs = UNet2DConditionModel.from_pretrained(peers.folder("sd1") / "unet")
    wrapped = get_peft_model(theirs, peft_configs()[name])
    generator = torch.Generator().manual_seed(4)
    own = ("lora_", "hada_", "lokr_", "oft_", "ia3_")
    for key, parameter in wrapped.named_parameters():
        if any(mark in key for mark in own):
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    wrapped.save_pretrained(tmp_path)
    plain = our_outputs(ours)[0]
    report = ours.load_lora(tmp_path)
    assert report.matched == report.total and report.dialect == "peft"
    found = our_outputs(ours)[0]
    assert (found - plain).abs().max() > 1e-3
    torch.testing.assert_close(found, their_unet(wrapped.base_model.model.eval()), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def their_unet(unet) -> torch.Tensor:
    no_text = SimpleNamespace(last_hidden_state=torch.zeros(1))
    return their_outputs(SimpleNamespace(unet=unet, text_encoder=lambda tokens: no_text))[0]


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ('{"unet.lora_alpha": 1, "unet.alpha_pattern": {"(([a-z_.0-9])+)+X": 2}}', "a sensible pattern"),
        ('{"unet.lora_alpha": 1, "unet.alpha_pattern": {"(": 2}}', "a sensible pattern"),
        ('{"unet.lora_alpha": "x"}', "a sensible alpha"),
        ('{"unet.lora_alpha": 1, "unet.alpha_pattern": []}', "a sensible alpha_pattern"),
        ('{"unet.lora_alpha": 1, "unet.alpha_pattern": {"to_q": null}}', None),
        ("[1]", "must hold a JSON object"),
        ("{", "is not valid JSON"),
    ],
)
def test_configurations_that_cannot_be_used(ours, tmp_path, entries, message):
    stem = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    tensors = {f"{stem}.lora_A.weight": drawn(4, 16), f"{stem}.lora_B.weight": drawn(16, 4)}
    save_file(tensors, tmp_path / "a.safetensors", {"lora_adapter_metadata": entries})
    if message is None:
        assert ours.load_lora(tmp_path / "a.safetensors").matched == 1
        return
    with pytest.raises(CheckpointError, match=message):
        ours.load_lora(tmp_path / "a.safetensors")
