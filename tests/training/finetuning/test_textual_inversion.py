import json

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from latentdiff import Pipeline
from latentdiff.cli import cli
from latentdiff.errors import CheckpointError, UsageError
from latentdiff.recipe import read_recipe
from latentdiff.training.finetuning.finetune import run
from tests import peers
from tests.training.finetuning.build import captioned_folder, model_folder, settings, state_of


@pytest.fixture
def tmp(tmp_path):
    folder = captioned_folder(tmp_path / "data", 6)
    lines = [json.dumps({"file_name": f"{index}.png", "text": "a photo of <spot>"}) for index in range(6)]
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path


def learn(tmp, **changes):
    return run(settings(tmp, method="textual_inversion", word="<spot>", initial_word="cat", lr=0.05, **changes))


def latents(pipe, prompt="<spot> on the left"):
    return pipe(prompt, seed=0, steps=2, output="latents", progress=False)


def test_a_word_is_learned_saved_and_loaded(tmp):
    path = learn(tmp, max_steps=20, checkpoint_every=20)
    assert path.name == "embedding.safetensors"
    ((word, vector),) = load_file(path).items()
    assert word == "<spot>" and vector.shape == (16,) and list(state_of(tmp / "run"))[0] == "vector"

    pipe = Pipeline.load(model_folder(), device="cpu")
    tokenizer, before, other = pipe.tokenizer, latents(pipe), latents(pipe, "cat")
    assert str(pipe.load_lora(path)) == "the word <spot>"
    changed = latents(pipe)
    assert not torch.equal(changed, before) and torch.equal(latents(pipe, "cat"), other)
    pipe.unload_lora(str(path))
    assert torch.equal(latents(pipe), before) and pipe.tokenizer is tokenizer


def test_the_start_is_the_initial_word(tmp):
    path = learn(tmp, max_steps=1, warmup_steps=1000)
    pipe = Pipeline.load(model_folder(), device="cpu")
    expected = latents(pipe, "cat on the left")
    pipe.load_lora(path)
    torch.testing.assert_close(latents(pipe), expected, rtol=0.05, atol=0.05)


def test_resumed_equals_unbroken(tmp):
    learn(tmp, out=tmp / "whole")
    learn(tmp, out=tmp / "parts", max_steps=3)
    learn(tmp, out=tmp / "parts")
    for name, value in state_of(tmp / "whole").items():
        assert torch.equal(state_of(tmp / "parts")[name], value), name


def test_images_with_a_word_are_made_again_from_their_recipe(tmp, monkeypatch):
    monkeypatch.chdir(tmp)
    path = learn(tmp, max_steps=2)
    command = f"generate <spot> --model {model_folder()} --lora {path} --steps 2 --seed 3 --out images --device cpu"
    assert CliRunner().invoke(cli, command.split(), catch_exceptions=False).exit_code == 0
    (image,) = (tmp / "images").glob("*.png")
    from PIL import Image

    (entry,) = read_recipe(Image.open(image).info).loras
    assert entry["file"] == "embedding.safetensors"
    again = f"reproduce {image} --model {model_folder()} --lora-dir {path.parent} --device cpu"
    assert CliRunner().invoke(cli, again.split(), catch_exceptions=False).exit_code == 0


def test_diffusers_reads_the_file(tmp):
    path = learn(tmp, model=str(peers.folder("sd1")), resolution=64, upscale=True, max_steps=2)
    pipe = peers.theirs.__wrapped__("sd1")
    pipe.load_textual_inversion(path)
    token = pipe.tokenizer.convert_tokens_to_ids("<spot>")
    vector = pipe.text_encoder.get_input_embeddings().weight[token]
    torch.testing.assert_close(vector.detach(), load_file(path)["<spot>"])


def test_two_words_at_once(tmp):
    pipe = Pipeline.load(model_folder(), device="cpu")
    for name, value in (("<one>", 1.0), ("<two>", -1.0)):
        save_file({name: torch.full((16,), value)}, tmp / f"{name[1:-1]}.safetensors")
    pipe.load_lora(tmp / "one.safetensors", name="1")
    alone = latents(pipe, "<one>")
    pipe.load_lora(tmp / "two.safetensors", name="2")
    assert torch.equal(latents(pipe, "<one>"), alone)
    second = latents(pipe, "<two>")
    pipe.unload_lora("1")
    assert torch.equal(latents(pipe, "<two>"), second)
    assert [entry["file"] for entry in pipe.adaptations()] == ["two.safetensors"]


def test_what_cannot_be(tmp):
    with pytest.raises(UsageError, match="'cat' is in the vocabulary already; choose a new word, for example <cat>"):
        run(settings(tmp, method="textual_inversion", word="cat"))
    save_file({"<x>": torch.zeros(5)}, tmp / "x.safetensors")
    with pytest.raises(CheckpointError, match="expected vectors of 16 numbers in .*, found the shape 5"):
        Pipeline.load(model_folder(), device="cpu").load_lora(tmp / "x.safetensors")
