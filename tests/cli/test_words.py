"""`latentdiff words`, and what `generate` says of a request beyond a model's training."""

from __future__ import annotations

import json
import shutil
from importlib import import_module

import pytest
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from latentdiff import Pipeline
from latentdiff.adapters.lora.adapter import LoRA
from latentdiff.adapters.lora.metadata import lora_metadata
from latentdiff.adapters.lora.saving import save_lora
from latentdiff.adapters.lora.spec import LoRASpec
from latentdiff.checkpoints.embedded import embedded_model
from latentdiff.errors import UsageError
from latentdiff.prompts.words import read_words


def note(word):
    return f'note: this model does not know "{word}"'


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


def test_words_go_with_the_model_into_a_file_and_back(command, knowing, workplace):
    expected = command("words", "--model", knowing).out
    assert command("convert", knowing, "one.safetensors").code == 0
    assert command("convert", "one.safetensors", "back").code == 0
    for place in ("one.safetensors", "back"):
        assert command("words", "--model", place).out == expected
        assert command("generate", "--model", place, "--steps", 1, "--seed", 1, "a dragn").err.startswith(note("dragn"))
    assert (workplace / "back/words.json").read_text() == (knowing / "words.json").read_text()


def test_a_file_that_tells_no_words(command, sd1, workplace):
    assert command("convert", sd1, "one.safetensors").code == 0
    assert command("words", "--model", "one.safetensors").code == 2
    Image.new("RGB", (8, 8)).save("a.png")
    assert command("words", "--model", "a.png").code == 2


def test_damaged_words_in_a_file_are_one_error(command, knowing, workplace):
    assert command("convert", knowing, "one.safetensors").code == 0
    with safe_open("one.safetensors", "pt") as file:
        metadata = file.metadata()
    stored = json.loads(metadata["latentdiff"])
    for damaged in ([], {"things": 3}, stored["words"] | {"size": 0}):
        text = json.dumps(stored | {"words": damaged})
        save_file(load_file("one.safetensors"), "two.safetensors", metadata | {"latentdiff": text})
        for done in (command("words", "--model", "two.safetensors"), command("convert", "two.safetensors", "x")):
            assert done.code == 1 and done.err.count("\n") == 1 and "words in the entry latentdiff" in done.err


def test_words_stay_when_another_vae_comes_and_go_when_a_text_encoder_does(command, knowing, sd1, workplace):
    command("convert", knowing, "vae.safetensors", "--vae", sd1)
    command("convert", knowing, "text.safetensors", "--text-encoder", sd1)
    assert command("words", "--model", "vae.safetensors").code == 0
    assert command("words", "--model", "text.safetensors").code == 2


def test_a_model_saved_from_python_keeps_its_words(knowing, tmp_path):
    pipe = Pipeline.load(knowing, device="cpu")
    pipe.save(tmp_path / "saved")
    assert pipe.words == read_words(tmp_path / "saved") == read_words(knowing)


def test_a_merged_lora_brings_its_words(command, knowing, workplace):
    pipe = Pipeline.load(knowing, device="cpu")
    lora = LoRA.create(pipe.unet, None, LoRASpec(rank=1))
    for words in ({}, {"words": ["dragn"]}):
        save_lora(lora, "a.safetensors", lora_metadata(pipe.unet.config, "epsilon", training=words))
        assert command("lora", "merge", "a.safetensors", "--model", knowing, "--out", "merged").code == 0
        said = command("generate", "--model", "merged", "--steps", 1, "--seed", 1, "a dragn cat", "a whal").err
        unknown = ["dragn", "whal"] if not words else ["whal"]
        assert said.startswith(note('", "'.join(unknown)))


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

    monkeypatch.setattr(import_module(f"latentdiff.cli.{name}"), "loaded_model", stop)
    notes = command(name, *arguments, "--model", knowing).err.splitlines()
    assert len(notes) == 2 and notes[0].startswith('note: this model does not know "dragn"') and notes[1] == "error: stop"
