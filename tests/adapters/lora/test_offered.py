"""LoRAs that prompts name, in one call of the pipeline."""

from __future__ import annotations

import pytest
import torch

from latentdiff.adapters.lora.saving import save_lora
from latentdiff.checkpoints.hashing import file_hash
from latentdiff.errors import UsageError
from latentdiff.prompts.syntax import read_prompt
from tests import peers
from tests.adapters.lora.conftest import make

OPTIONS = {"steps": 2, "seed": 3, "progress": False, "output": "latents"}


@pytest.fixture
def pipe(tmp_path):
    pipe = peers.ours("sd1")
    save_lora(make(pipe), tmp_path / "one.safetensors")
    save_lora(make(pipe, seed=2), tmp_path / "two.safetensors")
    pipe.offer_loras(tmp_path)
    return pipe


def test_each_prompt_has_its_own_and_nothing_is_left(pipe):
    prompts = ["cat <lora:one:0.5>", "cat <lora:one:0.5>", "cat", "cat <lora:two:1><lora:one:-1>"]
    together = pipe(prompts, **OPTIONS)
    for index, prompt in enumerate(prompts):
        alone = pipe(prompt, **{**OPTIONS, "seed": 3 + index})
        torch.testing.assert_close(together[index : index + 1], alone, rtol=1e-4, atol=1e-4)
    assert not torch.equal(together[:1], pipe("cat", **OPTIONS)) and not pipe.adaptations()


def test_a_tag_is_load_lora(pipe, tmp_path):
    tagged = pipe("cat<lora:one:0.5>", **OPTIONS)
    pipe.load_lora(tmp_path / "one.safetensors", 0.5)
    assert torch.equal(tagged, pipe("cat", **OPTIONS))


def test_two_numbers_are_those_of_text_encoder_and_unet(pipe, tmp_path):
    tagged = pipe("cat<lora:one:0.5:-1>", **OPTIONS)
    pipe.load_lora(tmp_path / "one.safetensors", "unet=-1,te=0.5")
    assert torch.equal(tagged, pipe("cat", **OPTIONS))


def test_unknown_names(pipe):
    with pytest.raises(UsageError, match="no LoRA called 'three', which the prompt names; offered are: one, two"):
        pipe("cat <lora:three:1>", **OPTIONS)
    with pytest.raises(UsageError, match="--lora-dir"):
        peers.ours("sd1")("cat <lora:one:1>", **OPTIONS)


def test_a_file_that_changed_is_another_one(pipe, tmp_path):
    """The recipe names what was drawn with, however long the pipeline lives."""
    tags = read_prompt("cat <lora:one:1>", "a1111").loras
    (before,) = pipe.offered.describe(tags)
    save_lora(make(pipe, seed=9), tmp_path / "one.safetensors")
    (after,) = pipe.offered.describe(tags)
    assert before["sha256"] != after["sha256"] == file_hash(tmp_path / "one.safetensors")


def test_what_is_kept_is_read_once_and_acts_as_if_it_were_read_again(pipe, tmp_path, monkeypatch):
    from latentdiff.adapters.lora import reading

    read = []
    monkeypatch.setattr(reading, "read_lora", lambda path, own=reading.read_lora: read.append(path.stem) or own(path))
    prompts = ["cat <lora:one:0.5>", "cat <lora:two:1><lora:one:-1>", "cat <lora:one:0.5>", "cat"]
    expected = [pipe(prompt, **OPTIONS) for prompt in prompts]
    assert read == ["one", "two", "one", "one"]
    pipe.loras.keep = 2
    read.clear()
    for prompt, image in zip(prompts, expected, strict=True):
        assert torch.equal(pipe(prompt, **OPTIONS), image)
    assert read == ["one", "two"]
    save_lora(make(pipe, seed=3), tmp_path / "one.safetensors")
    changed = pipe(prompts[0], **OPTIONS)
    assert not torch.equal(changed, expected[0]) and read == ["one", "two", "one"]
    pipe.loras.keep = 1
    pipe(prompts[1], **OPTIONS)  # two was kept; then one goes
    pipe("cat <lora:one:1>", **OPTIONS)
    pipe("cat <lora:two:1>", **OPTIONS)
    assert read[-1] == "two"
    pipe.load_lora(tmp_path / "one.safetensors", 0.5)
    assert torch.equal(pipe("cat", **OPTIONS), changed)
    pipe.load_lora(tmp_path / "one.safetensors", 0.25, "again")
    twice = pipe("cat", **OPTIONS)
    pipe.unload_lora()
    pipe.loras.keep = 0
    pipe.load_lora(tmp_path / "one.safetensors", 0.5)
    pipe.load_lora(tmp_path / "one.safetensors", 0.25, "again")
    assert torch.equal(pipe("cat", **OPTIONS), twice)
