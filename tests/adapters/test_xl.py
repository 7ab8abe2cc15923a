"""LoRAs and learned words of SDXL, in the names of every tool, against diffusers and PEFT."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file

from latentdiff.adapters.lora.saving import save_lora
from latentdiff.adapters.textual_inversion import NewWord
from latentdiff.errors import CheckpointError
from tests import peers, tiny
from tests.adapters.lora.conftest import make, our_image, their_image

TARGETS = ("attention", "feed_forward", "projections", "text_encoder", "text_encoder_mlp")


@pytest.fixture
def ours():
    return peers.ours("xl")


@pytest.fixture
def theirs() -> StableDiffusionXLPipeline:
    pipe = StableDiffusionXLPipeline.from_pretrained(peers.folder("xl"))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("dialect", ["kohya", "peft"])
def test_what_is_saved_opens_in_diffusers(ours, theirs, tmp_path, dialect: str) -> None:
    lora = make(ours, TARGETS)
    assert {name.partition(".")[0] for name in lora.layers} == {"unet", "text_encoder", "text_encoder_2"}
    save_lora(lora, tmp_path / "a.safetensors", dialect=dialect)
    names = load_file(tmp_path / "a.safetensors")
    if dialect == "kohya":  # as its tools call them: the U-Net's layers by the original layout
        assert {name.split("_")[1] for name in names} == {"unet", "te1", "te2"}
        assert any(name.startswith("lora_unet_input_blocks_4_1_transformer_blocks_1_attn2_to_k") for name in names)
    plain = our_image(ours)
    report = ours.load_lora(tmp_path / "a.safetensors")
    assert report.matched == report.total == len(lora.layers)
    theirs.load_lora_weights(tmp_path / "a.safetensors")
    found = our_image(ours)
    assert np.abs(found - plain).max() > 10
    assert np.abs(found - their_image(theirs)).max() <= 1
    ours.unload_lora()
    assert np.array_equal(our_image(ours), plain)


def test_names_of_the_diffusers_layout_in_kohyas_form(ours, tmp_path) -> None:
    """Some trainers write `lora_unet_down_blocks_...` for SDXL."""
    lora = make(ours, ("attention", "text_encoder"))
    save_lora(lora, tmp_path / "a.safetensors")
    stems = {theirs: name for name, theirs in lora.file_names.items()}
    renamed = {}
    for key, tensor in load_file(tmp_path / "a.safetensors").items():
        stem, _, role = key.partition(".")
        name = stems[stem]
        own = "lora_" + name.replace(".", "_") if name.startswith("unet.") else stem
        renamed[f"{own}.{role}"] = tensor
    save_file(renamed, tmp_path / "b.safetensors")
    assert any("down_blocks_1_attentions_0" in name for name in renamed)
    expected, found = ours.load_lora(tmp_path / "a.safetensors", 0.5), ours.load_lora(tmp_path / "b.safetensors", 0.5)
    assert found.matched == expected.matched == found.total


def test_what_peft_trained_is_read(ours, theirs, tmp_path) -> None:
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    linear = ["to_q", "to_k", "to_v", "to_out.0"]
    theirs.unet.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=linear, init_lora_weights=False))
    for encoder in (theirs.text_encoder, theirs.text_encoder_2):
        encoder.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    states = [
        convert_state_dict_to_diffusers(get_peft_model_state_dict(module))
        for module in (theirs.unet, theirs.text_encoder, theirs.text_encoder_2)
    ]
    StableDiffusionXLPipeline.save_lora_weights(tmp_path, *states)
    plain = our_image(ours)
    report = ours.load_lora(tmp_path)
    assert report.matched == report.total > 50
    found = our_image(ours)
    assert np.abs(found - plain).max() > 10 and np.abs(found - their_image(theirs)).max() <= 1


def test_strengths_of_the_parts(ours, tmp_path) -> None:
    lora = make(ours, ("attention", "text_encoder"))
    save_lora(lora, tmp_path / "a.safetensors")
    plain = ours.encode(["cat"])
    ours.load_lora(tmp_path / "a.safetensors", "unet=1,te=0")
    assert torch.equal(ours.encode(["cat"]), plain)


@pytest.mark.parametrize("count", [1, 3])
def test_a_word_of_both_encoders(ours, theirs, tmp_path, count: int) -> None:
    generator = torch.Generator().manual_seed(count)
    both = {
        "clip_l": torch.randn(count, tiny.CROSS_ATTENTION_DIM, generator=generator),
        "clip_g": torch.randn(count, tiny.SECOND_WIDTH, generator=generator),
    }
    save_file(both, tmp_path / "my-style.safetensors")
    plain = ours.encode(["a photo of the cat"])
    report = ours.load_lora(tmp_path / "my-style.safetensors")
    assert "my-style" in report
    theirs.load_textual_inversion({"my-style": both["clip_l"]}, token="my-style")
    theirs.load_textual_inversion(
        {"my-style": both["clip_g"]}, token="my-style", text_encoder=theirs.text_encoder_2, tokenizer=theirs.tokenizer_2
    )
    # Otherwise transformers takes the highest number for the end mark, which is now that of the word.
    theirs.text_encoder_2.eos_token_id = theirs.tokenizer_2.eos_token_id
    for module in theirs.text_encoder_2.modules():
        if hasattr(module, "eos_token_id"):
            module.eos_token_id = theirs.tokenizer_2.eos_token_id
    tokens, _, pooled, _ = theirs.encode_prompt("a my-style photo of the cat")
    found = ours.encode(["a my-style photo of the cat"])
    torch.testing.assert_close(found[:, :-1], tokens, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[:, -1, : tiny.POOLED_WIDTH], pooled, rtol=1e-5, atol=1e-5)
    ours.unload_lora()
    assert torch.equal(ours.encode(["a photo of the cat"]), plain)


def test_words_are_saved_as_they_are_read(ours, tmp_path) -> None:
    word = NewWord.create("<zebra>", ours.tokenizer, ours.text_encoder, "dog")
    word.save(tmp_path / "embedding.safetensors")
    assert set(load_file(tmp_path / "embedding.safetensors")) == {"clip_l", "clip_g"}
    assert "<zebra>" in ours.load_embedding(tmp_path / "embedding.safetensors")
    torch.testing.assert_close(ours.encode(["a <zebra>"])[:, 2], ours.encode(["a dog"])[:, 2])


def test_words_of_another_family_are_refused(ours, tmp_path) -> None:
    save_file({"<a>": torch.zeros(32)}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=r"for 1\.x or 2\.x; expected one for Stable Diffusion XL"):
        ours.load_embedding(tmp_path / "a.safetensors")
    save_file({"clip_l": torch.zeros(1, 32), "clip_g": torch.zeros(2, 24)}, tmp_path / "b.safetensors")
    with pytest.raises(CheckpointError, match="as many vectors"):
        ours.load_embedding(tmp_path / "b.safetensors")
