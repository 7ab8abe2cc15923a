"""Ways of the command line: help is help, and a mistyped path is never looked up on a hub."""

from __future__ import annotations

import socket

import pytest
import torch
from safetensors.torch import save_file

from latentdiff.files import is_hub_id
from latentdiff.image import open_image
from latentdiff.networks.tiny_vae import TinyVAE, TinyVAEConfig
from latentdiff.recipe import read_recipe


@pytest.fixture
def no_sockets(monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)


@pytest.mark.parametrize("arguments", [[], ["data"], ["lora"]])
def test_a_bare_group_prints_its_help(command, arguments):
    done = command(*arguments)
    assert done.code == 0 and done.err == ""
    assert done.out.startswith("Usage: latentdiff") and "Commands:" in done.out and len(done.out.splitlines()) > 5


@pytest.mark.parametrize("name", ["models/sd15", "./a", "../nothing", "~/a", "/a/b", "a/b/c", "sd15", "a/b.safetensors",
                                  "x/y.ckpt", "teapott"])  # fmt: skip
def test_mistyped_paths(command, workplace, no_sockets, name):
    (workplace / "models").mkdir()
    for arguments in (["inspect", name], ["data", "check", name], ["generate", "cat", "--model", name]):
        done = command(*arguments)
        assert done.code != 0 and len(done.errors) == 1
        assert "no such folder" in done.errors[0]


def test_what_looks_like_a_hub_id(workplace):
    (workplace / "models").mkdir()
    assert is_hub_id("stabilityai/stable-diffusion-2-1") and is_hub_id("someone/sd-v1.5")
    for name in ("models/sd15", "a/b/c", "./a", "a", "a/b.safetensors", "a/b.ZIP", "-a/b", "/a/b", ""):
        assert not is_hub_id(name)


def test_another_vae_and_schedule(command, sd1, workplace):
    torch.manual_seed(0)
    save_file(TinyVAE(TinyVAEConfig()).state_dict(), workplace / "taesd.safetensors")
    common = ("generate", "cat", "--model", sd1, "--steps", 2, "--seed", 1)
    assert command(*common, "--out", "own.png").code == 0
    assert command(*common, "--vae", "taesd.safetensors", "--out", "tiny.png").code == 0
    own, tiny = open_image("own.png"), open_image("tiny.png")
    assert own.size == tiny.size and own.tobytes() != tiny.tobytes()
    again = ("reproduce", "tiny.png", "--model", sd1)
    assert command(*again, "--vae", "taesd.safetensors").out.splitlines()[-1].startswith("identical")
    options = ("--prediction-type", "v_prediction", "--zero-terminal-snr")
    assert command(*common, *options, "--out", "zero.png").code == 0
    assert read_recipe(open_image("zero.png").info).zero_terminal_snr
    assert command("reproduce", "zero.png", "--model", sd1).out.splitlines()[-1].startswith("identical")
    done = command(*common, "--vae", "none.safetensors")
    assert done.code == 1 and "no such folder" in done.errors[0]
