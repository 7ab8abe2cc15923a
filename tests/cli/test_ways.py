"""Ways of the command line: help is help, and a mistyped path is never looked up on a hub."""

from __future__ import annotations

import socket

import pytest

from latentdiff.files import is_hub_id


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
