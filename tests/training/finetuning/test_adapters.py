"""Runs that train adapters of other kinds than plain LoRA, and LoRA by block."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open

from latentdiff import Pipeline, finetune
from latentdiff.adapters.lora import load_lora
from latentdiff.errors import ConfigError
from latentdiff.training.finetuning.finetune import resolve, run
from tests.training.finetuning.build import captioned_folder, model_folder, settings, state_of

EVERYTHING = ["attention", "feed_forward", "convolutions", "text_encoder"]


@pytest.fixture
def tmp(tmp_path):
    captioned_folder(tmp_path / "data", 10)
    return tmp_path


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
    ],
)
def test_what_does_not_combine_is_refused(tmp, changes, message):
    with pytest.raises(ConfigError, match=message):
        settings(tmp, **changes)
