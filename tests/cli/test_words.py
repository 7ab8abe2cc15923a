"""`latentdiff words`, and what `generate` says of a request beyond a model's training."""

from __future__ import annotations

import shutil
import sys

import pytest
from PIL import Image

from latentdiff.checkpoints.embedded import embedded_model
from latentdiff.errors import UsageError


@pytest.fixture
def knowing(sd1, tmp_path):
    """The tiny model with the embedded one's words."""
    folder = shutil.copytree(sd1, tmp_path / "knowing")
    shutil.copy(embedded_model() / "words.json", folder)
    return folder


def test_words_of_the_embedded_model(command):
    done = command("words")
    assert done.code == 0 and done.err == ""
    assert "cactus" in done.out and "counts: one, two, three, four\n" in done.out and "relations: above" in done.out
    assert max(map(len, done.out.splitlines())) <= 100


def test_a_model_that_does_not_say(command, sd1):
    done = command("words", "--model", sd1)
    assert done.code == 2 and done.err.startswith("error: ") and done.err.count("\n") == 1


def test_unknown_words_are_named_and_drawn_all_the_same(command, knowing, workplace):
    done = command("generate", "--model", knowing, "--steps", 1, "--seed", 1, "a dragn and seven rabits", "a dragn")
    assert done.code == 0 and len(done.out.splitlines()) == 2
    unknown, many = done.err.splitlines()
    assert unknown.startswith('note: this model does not know "dragn", "rabits" (nearest: ') and '"rabbits"' in unknown
    assert many == 'note: this model counts to four, and was asked for "seven"'


def test_nothing_is_said_where_a_model_does_not_tell_or_knows_all(command, sd1, knowing, workplace):
    assert command("generate", "--model", sd1, "--steps", 1, "--seed", 1, "a dragn").err == ""
    assert command("generate", "--model", knowing, "--steps", 1, "--seed", 1, "two cats", "--width", 96).err == ""


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("edit", ("a.png", "a dragn")),
        ("inpaint", ("a.png", "a dragn", "--mask", "mask.png")),
        ("translate", ("a.png", "a dragn")),
        ("invert", ("a.png", "--prompt", "a dragn")),
        ("interpolate", ("a cat", "a dragn", "--frames", 2)),
        ("restore", ("a.png", "--operator", "colourise", "--prompt", "a dragn")),
    ],
)
def test_every_task_names_unknown_words(command, knowing, workplace, monkeypatch, name, arguments):
    Image.new("RGB", (16, 16)).save("a.png")
    Image.new("L", (16, 16), 255).save("mask.png")

    def stop(settings):
        raise UsageError("stop")

    monkeypatch.setattr(sys.modules[f"latentdiff.cli.{name}"], "loaded_model", stop)
    notes = command(name, *arguments, "--model", knowing).err.splitlines()
    assert len(notes) == 2 and notes[0].startswith('note: this model does not know "dragn"') and notes[1] == "error: stop"
