"""Files written here work in diffusers, files written by PEFT and diffusers work here, and a training step is
PEFT's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from latentdiff.adapters.lora.adapter import LoRA
from latentdiff.adapters.lora.kinds import LoRALayer
from latentdiff.adapters.lora.loading import load_lora
from latentdiff.adapters.lora.saving import save_lora
from latentdiff.engines.fast_forms import use_plain_forms
from tests import peers
from tests.adapters.lora.conftest import EVERYTHING, make, our_image, our_outputs, their_image, their_outputs

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]


def agree(a, b) -> None:
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dialect", ["kohya", "peft"])
def test_diffusers_reads_what_we_write(ours, theirs, dialect, tmp_path):
    plain = our_image(ours)
    lora = make(ours)
    save_lora(lora, tmp_path / "lora.safetensors", dialect=dialect)
    theirs.load_lora_weights(tmp_path / "lora.safetensors")
    with lora.attached():
        agree(our_outputs(ours), their_outputs(theirs))
        mine = our_image(ours)
    assert np.abs(mine - their_image(theirs)).max() <= 1
    assert np.abs(mine - plain).max() > 5


@pytest.mark.parametrize("family", ["sd1"])
def test_ranks_and_alphas_that_differ_are_read_by_diffusers(ours, theirs, tmp_path):
    lora = make(ours)
    layers = {}
    for index, name in enumerate(lora.layers):
        target = ours.unet if name.startswith("unet.") else ours.text_encoder
        target = target.get_submodule(name.partition(".")[2])
        layers[name] = LoRALayer(target, rank=1 + index % 3, alpha=1.0 + index % 2)
        torch.nn.init.normal_(layers[name].lora_up.weight, std=0.1)
    mixed = LoRA(layers, ours.unet, ours.text_encoder)
    save_lora(mixed, tmp_path / "lora.safetensors")
    theirs.load_lora_weights(tmp_path / "lora.safetensors")
    with mixed.attached():
        agree(our_outputs(ours), their_outputs(theirs))


def peft_adapters(pipe, targets, rank=4, alpha=4):
    """Give a diffusers pipeline LoRAs by PEFT, all of whose weights count."""
    from peft import LoraConfig

    pipe.unet.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets))
    text_targets = ["q_proj", "v_proj", "out_proj", "fc1"]
    pipe.text_encoder.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=text_targets))
    generator = torch.Generator().manual_seed(4)
    for part in (pipe.unet, pipe.text_encoder):
        for name, parameter in part.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.1, generator=generator)


@pytest.mark.parametrize("alpha", [4, 2])
def test_we_read_what_diffusers_writes(ours, theirs, alpha, tmp_path):
    from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft.utils import get_peft_model_state_dict

    peft_adapters(theirs, [*ATTENTION, "conv1", "proj_in", "conv_in", "linear_1", "time_emb_proj"], alpha=alpha)
    metadata = {}
    if alpha != 4:  # without these diffusers itself forgets alpha
        for part in ("unet", "text_encoder"):
            metadata[f"{part}_lora_adapter_metadata"] = getattr(theirs, part).peft_config["default"].to_dict()
    theirs.save_lora_weights(
        tmp_path,
        unet_lora_layers=convert_state_dict_to_diffusers(get_peft_model_state_dict(theirs.unet)),
        text_encoder_lora_layers=convert_state_dict_to_diffusers(get_peft_model_state_dict(theirs.text_encoder)),
        **metadata,
    )
    assert LORA_ADAPTER_METADATA_KEY == "lora_adapter_metadata"
    lora, report = load_lora(tmp_path, ours.unet, ours.text_encoder)
    assert report.matched == report.total == len(lora.layers) > 100
    with lora.attached():
        agree(our_outputs(ours), their_outputs(theirs))
        assert np.abs(our_image(ours) - their_image(theirs)).max() <= 1


@pytest.mark.parametrize("rslora", [False, True])
def test_we_read_what_peft_writes(ours, theirs, rslora, tmp_path):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=4, lora_alpha=8, init_lora_weights="gaussian", target_modules=[*ATTENTION, "conv2"], use_rslora=rslora,
        rank_pattern={"attn2.to_k": 2}, alpha_pattern={"attn2.to_k": 3, "mid_block.*.to_q": 5},
    )  # fmt: skip
    wrapped = get_peft_model(theirs.unet, config)
    generator = torch.Generator().manual_seed(4)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    wrapped.save_pretrained(tmp_path)
    lora, report = load_lora(tmp_path, ours.unet, ours.text_encoder)
    assert report.dialect == "peft" and report.matched == report.total
    with lora.attached():
        agree(our_outputs(ours)[:1], their_outputs(theirs)[:1])


@pytest.mark.parametrize("family", ["sd1"])
def test_the_oldest_files_of_diffusers(ours, theirs, tmp_path):
    """Attention alone, its matrices named after the processors of that time."""
    lora = make(ours, ("attention", "text_encoder"), rank=4, alpha=4.0)
    old = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}
    tensors = {}
    for name, layer in lora.layers.items():
        head, _, leaf = name.removesuffix(".0").rpartition(".")
        stem = f"{head}.{'processor.' if head.endswith(('attn1', 'attn2')) else ''}{old.get(leaf, leaf)}_lora"
        tensors |= {f"{stem}.down.weight": layer.lora_down.weight, f"{stem}.up.weight": layer.lora_up.weight}
    save_file({name: tensor.detach() for name, tensor in tensors.items()}, tmp_path / "old.safetensors")
    theirs.load_lora_weights(tmp_path / "old.safetensors")
    loaded, report = load_lora(tmp_path / "old.safetensors", ours.unet, ours.text_encoder)
    assert report.dialect == "diffusers" and report.matched == report.total == len(lora.layers)
    with loaded.attached():
        agree(our_outputs(ours), their_outputs(theirs))


def test_kohya_files_of_others(ours, theirs, tmp_path):
    """With the linear layers' matrices as 1x1 convolutions, alphas of one number, and the original layout's names."""
    lora = make(ours, ("attention", "feed_forward", "projections"))
    save_lora(lora, tmp_path / "kohya.safetensors")
    tensors = load_file(tmp_path / "kohya.safetensors")
    save_file(tensors, tmp_path / "plain.safetensors")
    theirs.load_lora_weights(tmp_path / "plain.safetensors")
    odd = {name: t.flatten(1) if t.ndim == 4 else t.reshape(1) if t.ndim == 0 else t for name, t in tensors.items()}
    save_file({name: t.half() for name, t in odd.items()}, tmp_path / "odd.safetensors")
    for file in ("plain", "odd"):
        loaded, report = load_lora(tmp_path / f"{file}.safetensors", ours.unet, ours.text_encoder)
        assert report.matched == report.total == len(lora.layers)
        with loaded.attached():
            for a, b in zip(our_outputs(ours), their_outputs(theirs), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("targets", [("attention",), EVERYTHING[:4]])
def test_a_training_step_is_that_of_peft(ours, theirs, targets):
    from peft import LoraConfig

    use_plain_forms(ours.unet)  # weights in the order that the other one's have: sums are then rounded alike
    lora = make(ours, targets, rank=4, alpha=8.0)
    names = [name.removeprefix("unet.") for name in lora.layers]
    theirs.unet.requires_grad_(False)
    theirs.unet.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=names))
    adapters = dict(theirs.unet.named_parameters())
    pairs = []
    for name, layer in lora.layers.items():
        path = name.removeprefix("unet.")
        for side, part in (("lora_A", layer.lora_down), ("lora_B", layer.lora_up)):
            parameter = adapters[f"{path}.{side}.default.weight"]
            parameter.data.copy_(part.weight.data)
            pairs.append((part.weight, parameter))
    generator = torch.Generator().manual_seed(9)
    x, noise = torch.randn(2, 2, 4, 8, 8, generator=generator)
    t, context = torch.tensor([50, 800]), torch.randn(2, 5, 32, generator=generator)
    noisy = theirs.scheduler.add_noise(x, noise, t)
    before = [mine.detach().clone() for mine, _ in pairs]
    for parameters, predict in (
        ([mine for mine, _ in pairs], lambda: ours.unet.requires_grad_(False)(noisy, t.float(), context)),
        ([their for _, their in pairs], lambda: theirs.unet(noisy, t, context).sample),
    ):
        optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.01)
        with lora.attached():
            loss = torch.nn.functional.mse_loss(predict(), noise)
        loss.backward()
        optimizer.step()
    for old, (mine, their) in zip(before, pairs, strict=True):
        assert (mine.grad - their.grad).norm() <= 1e-5 * their.grad.norm()
        assert (mine - their).norm() <= 1e-5 * their.norm()
        assert not torch.equal(mine, old)


@pytest.mark.parametrize("family", ["sd1"])
def test_unloading_restores_every_bit(ours, tmp_path):
    for seed, rank in ((1, 2), (2, 3)):
        save_lora(make(ours, rank=rank, seed=seed), tmp_path / f"{seed}.safetensors")
    weights = {name: p.clone() for part in (ours.unet, ours.text_encoder) for name, p in part.state_dict().items()}
    plain = our_image(ours)
    assert str(ours.load_lora(tmp_path / "1.safetensors", scale=0.5)).startswith("matched 2")
    one = our_image(ours)
    ours.load_lora(tmp_path / "2.safetensors", scale=-0.25, name="second")
    both = our_image(ours)
    ours.unload_lora("second")
    assert np.array_equal(our_image(ours), one)
    ours.unload_lora()
    assert np.array_equal(our_image(ours), plain)
    assert not np.array_equal(one, plain) and not np.array_equal(one, both)
    for part in (ours.unet, ours.text_encoder):
        assert all(torch.equal(weights[name], p) for name, p in part.state_dict().items())


@pytest.mark.parametrize("family", ["sd2"])
def test_several_with_own_scales_equal_diffusers(ours, theirs, tmp_path):
    for seed in (1, 2):
        save_lora(make(ours, seed=seed), tmp_path / f"{seed}.safetensors")
        theirs.load_lora_weights(tmp_path / f"{seed}.safetensors", adapter_name=f"n{seed}")
    theirs.set_adapters(["n1", "n2"], [0.75, 0.5])
    ours.load_lora(tmp_path / "1.safetensors", scale=0.75)
    ours.load_lora(tmp_path / "2.safetensors", scale=0.5)
    agree(our_outputs(ours), their_outputs(theirs))
    assert np.abs(our_image(ours) - their_image(theirs)).max() <= 1


def test_recipes_name_the_loras(tmp_path):
    from hashlib import sha256

    from latentdiff.recipe import read_recipe

    pipe = peers.ours("sd1")
    save_lora(make(pipe), tmp_path / "a.safetensors")
    pipe.load_lora(tmp_path / "a.safetensors", scale=0.5)
    (image,) = pipe("cat", steps=1, progress=False)
    digest = sha256((tmp_path / "a.safetensors").read_bytes()).hexdigest()
    assert read_recipe(image.info).loras == [{"file": "a.safetensors", "sha256": digest, "scale": 0.5}]


def test_half_precision_model_with_a_lora(tmp_path):
    pipe = peers.ours("sd1")
    save_lora(make(pipe), tmp_path / "a.safetensors")
    pipe.load_lora(tmp_path / "a.safetensors")
    exact = our_image(pipe)
    pipe.to("cpu", "bf16")
    assert np.abs(our_image(pipe) - exact).mean() < 6
