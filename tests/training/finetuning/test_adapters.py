"""Runs that train adapters of other kinds than plain LoRA, and LoRA by block."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open

from latentdiff import Pipeline, finetune
from latentdiff.adapters.lora.loading import load_lora
from latentdiff.errors import ConfigError
from latentdiff.training.finetuning.finetune import resolve, run
from latentdiff.training.finetuning.preparation import Preparation, make_accelerator
from tests import tiny
from tests.training.finetuning.build import listing_model, model_folder, settings, state_of

EVERYTHING = ["attention", "feed_forward", "convolutions", "text_encoder"]


def assert_same(first, second):
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


@pytest.mark.parametrize("adapter", ["dora", "loha", "lokr", "oft"])
def test_every_kind_resumes_exactly_and_its_file_is_what_was_trained(tmp, adapter):
    how = {"adapter": adapter, "targets": EVERYTHING, "keep": "old", "lr": 1e-3}
    for name, steps in (("whole", 4), ("parts", 2)):
        result = run(settings(tmp, out=tmp / name, max_steps=steps, **how))
    run(resolve(tmp / "parts", None, {"max_steps": 4}))
    assert_same(state_of(tmp / "parts"), state_of(tmp / "whole"))
    finetune(resume=tmp / "parts", max_steps=6, verify_resume=2)
    pipe = Pipeline.load(model_folder(), device="cpu")
    lora, report = load_lora(result.parents[1] / "whole" / "lora.safetensors", pipe.unet, pipe.text_encoder)
    assert report.matched == report.total == len(lora.layers)
    averaged = {name.removeprefix("ema "): t for name, t in state_of(tmp / "whole").items() if name.startswith("ema ")}
    for name, layer in lora.layers.items():
        for role, tensor in {**dict(layer.named_parameters()), **dict(layer.named_buffers())}.items():
            assert torch.equal(tensor, averaged[f"{name}.{role}"]), f"{name}.{role}"
    before = pipe("cat", seed=0, steps=2, output="latents", progress=False)
    pipe.load_lora(tmp / "whole" / "lora.safetensors")
    assert (pipe("cat", seed=0, steps=2, output="latents", progress=False) - before).abs().max() > 1e-5


def test_a_model_that_lists_its_words_is_adapted_everywhere(tmp):
    """Its text encoder has read no others; of other models only the attention is adapted, as everywhere in the field."""
    named = {}
    for name, model in (("listing", listing_model(tmp, ["a"])), ("plain", model_folder())):
        made = Preparation(*reversed(make_accelerator(settings(tmp, model=str(model)))))
        named[name] = set(made.method.lora.layers)
        assert "auto" not in made.settings.targets  # what is written down is what was taken
    assert named["plain"] < named["listing"] and all(".attn" in layer for layer in named["plain"])
    for part in (".conv1", ".ff.", ".proj_in", ".self_attn.", ".mlp."):
        assert any(part in layer for layer in named["listing"])


@pytest.mark.parametrize(
    ("lists", "asked", "trained"), [(True, {}, True), (False, {}, False), (True, {"train_text_encoder": False}, False)]
)
def test_of_a_model_that_lists_its_words_all_is_trained_whole(tmp, lists, asked, trained):
    model = listing_model(tmp, ["a"]) if lists else model_folder()
    made = Preparation(*reversed(make_accelerator(settings(tmp, model=str(model), method="full", **asked))))
    assert made.settings.train_text_encoder is trained
    assert any(parameter.requires_grad for parameter in made.method.parts.text_encoder.parameters()) is trained


def test_the_file_says_what_it_is_as_lycoris_does(tmp):
    result = run(settings(tmp, adapter="dora", dora_lengths="outputs", max_steps=1, result_precision="fp16"))
    with safe_open(result, "pt") as file:
        about, shapes = file.metadata(), {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    assert json.loads(about["ss_network_args"]) == {"algo": "lora", "dora_wd": "True", "wd_on_output": "True"}
    assert (about["ss_network_module"], about["ss_network_dim"]) == ("lycoris.kohya", "2")
    assert all(shape[1:] == [1] for name, shape in shapes.items() if name.endswith("dora_scale"))


def test_blocks_have_ranks(tmp):
    run(settings(tmp, block_rank={"mid": 3, "up": 0}, max_steps=1))
    ranks = {n.split(".")[1]: t.shape[0] for n, t in state_of(tmp / "run").items() if n.endswith("lora_down.weight")}
    assert ranks == {"down_blocks": 2, "mid_block": 3}


def first_step(tmp, **changes):
    """By how much each parameter moved in the first step, in units of the learning rate; Adam's first step has size 1."""
    made = Preparation(*reversed(make_accelerator(settings(tmp, warmup_steps=0, batch_size=2, **changes))))
    made.read_data()
    made.build_caches()
    with made.trainer() as trainer:
        before = {name: parameter.detach().clone() for name, parameter in trainer.parameters.items()}
        trainer.replay(1)
        return {
            name: round(((parameter - before[name]).abs().max() / trainer.settings.lr).item(), 2)
            for name, parameter in trainer.parameters.items()
        }


def test_second_matrices_and_blocks_have_rates(tmp):
    how = {"loraplus": 16, "lr": 1e-3, "block_lr": {"mid": 2e-3, "text_encoder": 5e-4}, "text_encoder_lr": 1e-4}
    moved = first_step(tmp, targets=["attention", "text_encoder"], **how)
    blocks = {"unet.mid_block": 2, "unet.": 1, "text_encoder.": 0.5}
    seen = set()
    for name, found in moved.items():
        if name.endswith("lora_down.weight"):  # whose gradients are zero while the second ones are
            assert found == 0
            continue
        block = next(block for block in blocks if name.startswith(block))
        seen.add(block)
        assert found == pytest.approx(16 * blocks[block], rel=0.02), name
    assert seen == set(blocks)


def test_dora_lengths_keep_their_rate_beside_loraplus(tmp):
    moved = first_step(tmp, adapter="dora", loraplus=4, lr=1e-4)
    assert {found for name, found in moved.items() if name.endswith("lengths")} == {1.0}
    assert {found for name, found in moved.items() if name.endswith("lora_up.weight")} == {4.0}


def test_norms_stay_within_their_limit_in_a_run(tmp):
    run(settings(tmp, out=tmp / "free", max_steps=4))
    run(settings(tmp, out=tmp / "whole", max_steps=4, max_norm=0.01))
    run(settings(tmp, out=tmp / "parts", max_steps=2, max_norm=0.01))
    run(resolve(tmp / "parts", None, {"max_steps": 4}))
    assert_same(state_of(tmp / "parts"), state_of(tmp / "whole"))
    norms = {}
    for name in ("free", "whole"):
        state = state_of(tmp / name)
        ups = {key: value for key, value in state.items() if key.endswith("lora_up.weight") and "ema" not in key}
        norms[name] = [(up @ state[key.replace("lora_up", "lora_down")]).norm().item() for key, up in ups.items()]
    assert max(norms["whole"]) <= 0.01 * (1 + 1e-5) < max(norms["free"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"adapter": "oft", "alpha": 2}, "oft rotates, and is not scaled; leave out alpha and rslora"),
        ({"adapter": "oft", "rank": 1}, "expected 2 or more, found 1"),
        ({"lokr_factor": 4}, "lokr_factor goes with adapter lokr, found lora"),
        ({"adapter": "loha", "dora_lengths": "outputs"}, "dora_lengths goes with adapter dora, found loha"),
        ({"method": "full", "adapter": "loha"}, "adapter goes with method lora, found full"),
        ({"method": "full", "block_rank": "mid=2"}, "block_rank goes with method lora, found full"),
        ({"block_rank": "mid"}, "expected BLOCK=VALUE, such as mid=32"),
        ({"block_rank": ["mid=2", "up=-1"]}, "expected BLOCK=RANK with a rank of 0 or more"),
        (
            {"block_lr": "mid=0"},
            "expected BLOCK=LR with a rate above 0, such as mid=1e-4; block_rank mid=0 leaves it out",
        ),
        ({"block_lr": "mid=1e-4", "optimizer": "prodigy"}, "one step size for all; leave out block_lr and loraplus"),
        ({"loraplus": 4, "adapter": "loha"}, "loraplus goes with adapters lora and dora, found loha"),
        ({"max_norm": 1, "adapter": "oft"}, "oft rotates, which keeps norms; leave out max_norm"),
        ({"max_norm": 1, "optimizer": "schedulefree"}, "leave out max_norm"),
        ({"rank_dropout": 0.1, "adapter": "dora"}, "rank_dropout goes with adapter lora, found dora"),
        ({"dropout": 0.1, "compile": True}, "which compiled networks cannot; leave out compile"),
        ({"module_dropout": 0.1, "loss": "dpo"}, "without dropouts; leave them out"),
        ({"dropout": 1}, "dropout"),
    ],
)
def test_what_does_not_combine_is_refused(tmp, changes, message):
    with pytest.raises(ConfigError, match=message):
        settings(tmp, **changes)


@pytest.mark.parametrize("adapter", ["dora", "lokr"])
def test_models_of_the_shape_of_sdxl(tmp, adapter):
    model, how = (
        str(tiny.xl_folder(tmp)),
        {"targets": EVERYTHING, "block_rank": ["up=0", "text_encoder=2"], "max_norm": 1},
    )
    result = run(
        settings(tmp, model=model, adapter=adapter, resolution=64, upscale=True, max_steps=2, module_dropout=0.1, **how)
    )
    pipe = Pipeline.load(model, device="cpu")
    lora, report = load_lora(result, pipe.unet, pipe.text_encoder)
    assert report.matched == report.total == len(lora.layers)
    assert {name.partition(".")[0] for name in lora.layers} == {"unet", "text_encoder", "text_encoder_2"}
    averaged = {name.removeprefix("ema "): t for name, t in state_of(tmp / "run").items() if name.startswith("ema ")}
    for name, layer in lora.layers.items():
        for role, tensor in {**dict(layer.named_parameters()), **dict(layer.named_buffers())}.items():
            assert torch.equal(tensor, averaged[f"{name}.{role}"]), f"{name}.{role}"


DROPOUTS = {"dropout": 0.3, "rank_dropout": 0.3, "module_dropout": 0.2, "targets": EVERYTHING, "keep": "old"}


def test_dropouts_resume_exactly_also_where_blocks_are_computed_again(tmp):
    run(settings(tmp, out=tmp / "whole", max_steps=4, **DROPOUTS))
    run(settings(tmp, out=tmp / "parts", max_steps=2, gradient_checkpointing=True, **DROPOUTS))
    run(resolve(tmp / "parts", None, {"max_steps": 4}))
    assert_same(state_of(tmp / "parts"), state_of(tmp / "whole"))
    finetune(resume=tmp / "parts", max_steps=6, verify_resume=2)


def test_dropouts_are_the_same_in_micro_batches_and_change_what_is_learned(tmp):
    how = {**DROPOUTS, "max_steps": 2, "lr": 1e-3}
    run(settings(tmp, out=tmp / "whole", **how))
    run(settings(tmp, out=tmp / "micro", accumulation=4, **how))
    run(settings(tmp, out=tmp / "none", **{**how, "dropout": 0, "rank_dropout": 0, "module_dropout": 0}))
    whole, micro, none = (
        {key: value for key, value in state_of(tmp / name).items() if "exp_avg" in key and "_sq" not in key}
        for name in ("whole", "micro", "none")
    )
    size = sum(value.square().sum() for value in whole.values())
    apart = [sum((other[key] - value).square().sum() for key, value in whole.items()) for other in (micro, none)]
    assert apart[0] < 1e-6 * size < 0.05 * size < apart[1]
