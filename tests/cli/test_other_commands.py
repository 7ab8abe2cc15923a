"""`inspect`, `convert`, `train`, `evaluate`, and what all commands share."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import latentdiff
from latentdiff import Pipeline
from latentdiff.checkpoints.conversion import convert
from latentdiff.checkpoints.files import read_tensors
from tests import peers
from tests.cli.conftest import files

COMMANDS = ("generate", "words", "reproduce", "inspect", "convert", "train", "evaluate")


def test_version(command):
    assert command("--version").out == f"latentdiff, version {latentdiff.__version__}\n"


def test_help_lists_the_commands(command):
    done = command("--help")
    assert done.code == 0 and all(f"\n  {name} " in done.out for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_every_command(command, name):
    for flag in ("--help", "-h"):
        done = command(name, flag)
        assert done.code == 0 and done.out.startswith(f"Usage: latentdiff {name}")


def test_help_shows_choices_and_defaults(command):
    out = " ".join(command("generate", "--help").out.split())
    for said in (
        "[ddim|ddpm|euler|dpmpp-2m|unipc|euler-a|",
        "[default: the model's, or ddim]",
        "[default: 25]",
        "[auto|fp32|bf16|fp16|int8]",
        "VAE's factor (8)",
    ):
        assert said in out


@pytest.mark.parametrize("arguments", [["paint"], ["inspect"], ["convert", "a"], ["train"]])
def test_wrong_usage(command, arguments):
    done = command(*arguments)
    assert done.code == 2 and "Traceback" not in done.err


def test_unreadable_file_is_one_line(command, monkeypatch, workplace):
    (workplace / "model.ckpt").touch()

    def fail(source):
        raise PermissionError(13, "Permission denied", source)

    monkeypatch.setattr("latentdiff.checkpoints.inspection.inspect", fail)
    done = command("inspect", "model.ckpt")
    assert (done.code, done.err) == (1, "error: [Errno 13] Permission denied: 'model.ckpt'\n")


def test_inspect(command):
    done = command("inspect", peers.folder("sd2"))
    assert done.code == 0 and "v_prediction" in done.out and "Stable Diffusion 2" in done.out


def test_inspect_for_programs(command, sd1):
    done = command("inspect", sd1, "--json")
    report = json.loads(done.out)
    assert done.code == 0 and report["kind"] == "diffusers folder" and report["short_hash"] == report["sha256"][:10]
    assert report["parameters"]["unet"] > 0


def test_inspect_what_is_no_model(command, workplace):
    (workplace / "page.safetensors").write_text("<!DOCTYPE html><html>")
    (workplace / "empty").mkdir()
    for source, said in (("page.safetensors", "HTML"), ("nothing", "no model at nothing"), ("empty", "expected model_index")):
        done = command("inspect", source)
        assert done.code == 1 and said in done.out + done.err


def test_convert_again_is_the_same(command, sd1, workplace):
    """As after a kill in the last moment, when the file is there already."""
    assert command("convert", sd1, "model.safetensors").code == 0
    first = (workplace / "model.safetensors").read_bytes()
    assert command("convert", sd1, "model.safetensors").code == 0
    assert (workplace / "model.safetensors").read_bytes() == first
    (workplace / "folder.safetensors").mkdir()
    done = command("convert", sd1, "folder.safetensors")
    assert done.code == 2 and "it is a folder" in done.errors[0]


def test_convert_there_and_back(command, sd1, workplace):
    assert command("convert", sd1, "model.safetensors").out == "model.safetensors\n"
    assert command("convert", "model.safetensors", "again").out == "again\n"
    images = [
        np.asarray(Pipeline.load(source, device="cpu")("cat", steps=2, seed=0, progress=False)[0]).astype(int)
        for source in (sd1, "model.safetensors", "again")
    ]
    # The weights are the same bits, but lie elsewhere in memory, and some kernels round differently there.
    assert np.abs(images[0] - images[1]).max() <= 1 and np.abs(images[0] - images[2]).max() <= 1


def test_convert_takes_the_averaged_weights(command, workplace):
    folder = peers.folder("sd1")
    convert(folder, "model.safetensors")
    file = read_tensors(Path("model.safetensors"))
    tensors = file.tensors
    averaged = {
        f"model_ema.{name.removeprefix('model.').replace('.', '')}": 2 * tensor
        for name, tensor in tensors.items()
        if name.startswith("model.diffusion_model.")
    }
    save_file(tensors | averaged, "both.safetensors", file.metadata)
    assert command("convert", "both.safetensors", "averaged", "--ema", "--prediction-type", "v_prediction").code == 0
    assert command("convert", "both.safetensors", "last").code == 0
    weights = "unet/diffusion_pytorch_model.safetensors"
    (last, first) = load_file(f"last/{weights}"), load_file(folder / weights)
    for name, tensor in load_file(f"averaged/{weights}").items():
        assert torch.equal(tensor, 2 * first[name]) and torch.equal(last[name], first[name])
    config = json.loads((workplace / "averaged/scheduler/scheduler_config.json").read_text())
    assert config["prediction_type"] == "v_prediction"
    done = command("convert", folder, "x.safetensors", "--ema")
    assert done.code == 1 and "load it without ema" in done.errors[0]


def test_convert_failures_leave_nothing(command, sd1, workplace):
    (workplace / "bad.safetensors").write_bytes(b"\x00" * 100)
    assert command("convert", "bad.safetensors", "out").code == 1
    assert command("convert", sd1, "bad.safetensors/x").code == 2
    assert files(workplace) == ["bad.safetensors"] and not (workplace / "out").exists()


def test_train_hands_over(command, monkeypatch, workplace):
    import latentdiff.training.stages.config
    import latentdiff.training.stages.train

    seen = {}
    (workplace / "a.yaml").write_text("")

    def load_config(path, overrides):
        seen["config"] = (path, overrides)
        return "settings"

    def train(config, stages):
        seen["train"] = (config, stages)
        return Path("runs/x/model")

    monkeypatch.setattr(latentdiff.training.stages.config, "load_config", load_config)
    monkeypatch.setattr(latentdiff.training.stages.train, "train", train)
    done = command("train", "a.yaml", "--set", "seed=3", "--out", "runs/y", "--stage", "vae")
    assert (done.code, done.out) == (0, "runs/x/model\n")
    assert seen == {"config": (Path("a.yaml"), ["seed=3", "run=runs/y"]), "train": ("settings", ("vae",))}


def test_train_with_a_bad_configuration(command, workplace):
    (workplace / "bad.yaml").write_text("run: x\nsteps: 5\n")
    for config in ("bad.yaml", "none.yaml"):
        done = command("train", config)
        assert done.code == 1 and len(done.errors) == 1
    assert files(workplace) == ["bad.yaml"]


def test_evaluate_hands_over(command, monkeypatch, workplace):
    seen = {}
    for model in ("m", "other"):
        (workplace / model).mkdir()
    (workplace / "a.safetensors").touch()
    module = types.ModuleType("latentdiff.evaluation")
    module.evaluate = lambda **options: seen.update(options) or "the scores"
    monkeypatch.setitem(sys.modules, "latentdiff.evaluation", module)
    monkeypatch.setattr(latentdiff, "evaluation", module, raising=False)
    done = command(
        "evaluate", "--model", "m", "--lora", "a.safetensors:0.5", "--limit", 3, "--seeds", 2, "--steps", 9, "--guidance", 4,
        "--sampler", "euler", "--compare", "other",
    )  # fmt: skip
    assert (done.code, done.out) == (0, "the scores\n")
    assert seen == {
        "model": "m", "out": Path("evaluation"), "limit": 3, "seeds": 2, "steps": 9, "guidance": 4.0, "sampler": "euler",
        "scenes": None, "device": "auto", "loras": [("a.safetensors", 0.5)], "compare": "other",
    }  # fmt: skip
