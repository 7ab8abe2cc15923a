"""Learned words of all forms of files, against diffusers' `load_textual_inversion`."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from latentdiff.adapters.textual_inversion import NewWord, is_word_file, read_embedding, read_words
from latentdiff.errors import CheckpointError, UsageError
from tests import peers

WIDTH = 32


def vectors(count: int) -> torch.Tensor:
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(count))


def write(folder, form: str, count: int):
    """A file of one of the forms of the field, and the word that it teaches."""
    own = vectors(count)
    forms = {
        "a1111": (
            "my-style.pt",
            {"string_to_token": {"*": 265}, "string_to_param": {"*": own}, "name": "x", "step": 9},
        ),
        "parameter": ("my-style.pt", {"string_to_param": {"*": torch.nn.Parameter(own)}, "name": "my-style"}),
        "diffusers": ("learned_embeds.bin", {"<teapot>": own[0] if count == 1 else own}),
        "safetensors": ("file.safetensors", {"<teapot>": own}),
        "unnamed": ("my-style.safetensors", {"emb_params": own}),
    }
    name, content = forms[form]
    path = folder / name
    save_file(content, path) if path.suffix == ".safetensors" else torch.save(content, path)
    return path, "<teapot>" if form in ("diffusers", "safetensors") else "my-style"


def expanded(tokenizer, prompt: str) -> torch.Tensor:
    """Ids of a prompt in which a word takes as many places as it has vectors."""
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    ids = [each for token in ids for each in getattr(tokenizer, "expansions", {}).get(token, (token,))]
    ids = [tokenizer.bos_token_id, *ids, tokenizer.eos_token_id]
    return torch.tensor([ids + [tokenizer.pad_token_id] * (tokenizer.model_max_length - len(ids))])


@pytest.fixture
def theirs():
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline.from_pretrained(peers.folder("sd1"), safety_checker=None)


@pytest.mark.parametrize(
    ("form", "count"),
    [("a1111", 3), ("parameter", 1), ("diffusers", 1), ("safetensors", 4), ("unnamed", 1), ("unnamed", 2)],
)
@torch.no_grad()
def test_same_embeddings_as_diffusers(theirs, tmp_path, form, count):
    path, word = write(tmp_path, form, count)
    ours = peers.ours("sd1")
    assert is_word_file(path)
    plain = ours.text_encoder(expanded(ours.tokenizer, "a photo of the cat"))
    report = ours.load_lora(path)
    assert word in report and (count == 1 or f"{count} vectors" in report)
    prompt = f"a {word} photo of the cat"
    theirs.load_textual_inversion(path, token=word)
    expected, _ = theirs.encode_prompt(prompt, "cpu", 1, False)
    torch.testing.assert_close(ours.text_encoder(expanded(ours.tokenizer, prompt)), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.encode([prompt]), expected, rtol=1e-5, atol=1e-5)
    ours.unload_lora(str(path))
    assert torch.equal(ours.text_encoder(expanded(ours.tokenizer, "a photo of the cat")), plain)
    with pytest.raises(UsageError, match="no LoRA called"):
        ours.unload_lora(str(path))


def test_two_words_and_their_order(tmp_path):
    ours = peers.ours("sd1")
    for form in ("a1111", "safetensors"):
        ours.load_embedding(write(tmp_path, form, 2)[0])
    ids = expanded(ours.tokenizer, "my-style cat <teapot>")[0, 1:6].tolist()
    assert ours.tokenizer.convert_ids_to_tokens(ids) == ["my-style", "my-style_1", "cat</w>", "<teapot>", "<teapot>_1"]
    assert [entry["file"] for entry in ours.adaptations()] == ["my-style.pt", "file.safetensors"]


def test_saved_is_read(tmp_path):
    for count in (1, 3):
        NewWord("<fox>", vectors(count)).save(tmp_path / "fox.safetensors")
        (word,) = read_words(
            tmp_path / "fox.safetensors", read_embedding(tmp_path / "fox.safetensors"), peers.ours("sd1").text_encoder
        )
        assert word.word == "<fox>" and torch.equal(word.vectors, vectors(count))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"<a>": torch.zeros(2, 768)}, "vectors of 32 numbers .* shape 2x768: it is for another model"),
        ({"<a>": torch.zeros(2, 2, WIDTH)}, "vectors of 32 numbers"),
        ({"<a>": torch.full((WIDTH,), torch.nan)}, "NaN"),
        ({"<a>": torch.zeros(76, WIDTH)}, "at most 75 vectors"),
        ({"clip_l": torch.zeros(1, 768), "clip_g": torch.zeros(1, 1280)}, "embedding for Stable Diffusion XL"),
        ({"<a>": torch.zeros(WIDTH), "<b>": torch.zeros(WIDTH)}, "one word in .*, found 2 tensors"),
    ],
)
def test_what_is_none_for_this_model(tmp_path, content, message):
    save_file(content, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=message):
        peers.ours("sd1").load_embedding(tmp_path / "a.safetensors")


def test_a_word_of_the_vocabulary_is_refused(tmp_path):
    save_file({"cat": vectors(1)}, tmp_path / "a.safetensors")
    with pytest.raises(UsageError, match="'cat' is in the vocabulary already"):
        peers.ours("sd1").load_embedding(tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="there is no embedding"):
        peers.ours("sd1").load_embedding(tmp_path / "none.pt")


def test_nothing_is_executed(tmp_path):
    import os

    class Harm:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "harmed"),)

    torch.save({"string_to_param": {"*": vectors(1)}, "x": Harm()}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="could run code"):
        peers.ours("sd1").load_embedding(tmp_path / "a.pt")
    assert not (tmp_path / "harmed").exists()
