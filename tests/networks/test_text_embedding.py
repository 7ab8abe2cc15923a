"""Weights, chunks and clip skip in embeddings: against transformers, and by closed forms on synthetic encoders."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from latentdiff.checkpoints.tokenizer import clip_tokenizer_files
from latentdiff.errors import UsageError
from latentdiff.networks.text_embedding import PromptEncoder, Reading
from latentdiff.networks.text_encoder import TextEncoder
from latentdiff.prompts.tokenizer import Tokenizer
from tests import peers, tiny

CPU = torch.device("cpu")
A1111, COMFY, PLAIN = (Reading(syntax) for syntax in ("a1111", "comfy", "plain"))


class Synthetic(nn.Module):
    """Each token's embedding is drawn from its id and its place alone, so that what a weight does can be written down."""

    depth = 3

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(49408, 8, generator=torch.Generator().manual_seed(0)) + 0.5)
        self.calls = 0

    def forward(self, ids: Tensor, skip: int = 0) -> Tensor:
        self.calls += 1
        return self.table[ids] + torch.arange(ids.shape[1])[:, None] / 100.0


@cache
def clip() -> Tokenizer:
    return Tokenizer(clip_tokenizer_files("<|endoftext|>"))


@cache
def synthetic() -> Synthetic:
    return Synthetic()


@torch.no_grad()
def embed(text: str, reading: Reading) -> Tensor:
    return PromptEncoder(clip(), synthetic(), CPU, reading).text(text)


def test_without_grammar_all_syntaxes_are_the_same_bit_for_bit():
    for text in ("", "a cat", "two dogs, and a rocket " * 8):
        expected = embed(text, PLAIN)
        assert expected.shape == (1, 77, 8)
        assert torch.equal(embed(text, A1111), expected) and torch.equal(embed(text, COMFY), expected)


def test_a_weight_multiplies_its_tokens_and_the_mean_is_restored():
    plain, found = embed("a cat dog", A1111), embed("a (cat:1.5) dog", A1111)
    scaled = plain.clone()
    scaled[:, 2] *= 1.5  # behind the start mark and "a"
    torch.testing.assert_close(found, scaled * plain.mean() / scaled.mean())


def test_comfy_moves_away_from_the_empty_prompt():
    plain, empty, found = embed("a cat dog", COMFY), embed("", COMFY), embed("a (cat:1.5) dog", COMFY)
    expected = plain.clone()
    expected[:, 2] = empty[:, 2] + 1.5 * (plain[:, 2] - empty[:, 2])
    torch.testing.assert_close(found, expected)
    assert torch.equal(found[:, 3:], plain[:, 3:])


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["cat", "dog", "red", ","]), st.floats(0.1, 3.0)), min_size=1, max_size=30))
def test_the_mean_of_every_chunk_is_that_without_weights(words):
    text = " ".join(f"({word}:{weight:.3f})" for word, weight in words)
    found, plain = embed(text, A1111), embed(" ".join(word for word, _ in words), A1111)
    for one, other in zip(found.split(77, dim=1), plain.split(77, dim=1), strict=True):
        torch.testing.assert_close(one.mean(), other.mean(), rtol=1e-4, atol=1e-5)


def test_chunks_are_encoded_alone_and_joined():
    first, second = embed("cat " * 75, A1111), embed("(dog:1.3)", A1111)
    assert torch.equal(embed("cat " * 75 + "(dog:1.3)", A1111), torch.cat([first, second], dim=1))
    assert torch.equal(embed("cat BREAK dog", A1111), torch.cat([embed("cat", A1111), embed("dog", A1111)], dim=1))


def test_weights_that_leave_nothing_are_an_error():
    class Ones(Synthetic):
        def forward(self, ids: Tensor, skip: int = 0) -> Tensor:
            return torch.ones(1, ids.shape[1], 8)

    with pytest.raises(UsageError, match="expected weights that leave something of the prompt, found 'a "):
        PromptEncoder(clip(), Ones(), CPU, A1111).text("a (cat:-76)")


def test_stages_and_parts():
    encoder = PromptEncoder(clip(), Synthetic(), CPU, A1111)
    prompt = encoder.prompt("[cat:dog:0.5] AND red:0.5", 10)
    assert [part.weight for part in prompt.parts] == [1.0, 0.5] and not prompt.is_plain
    first, second = prompt.parts
    for step, text in ((1, "cat "), (5, "cat "), (6, "dog "), (10, "dog "), (11, "dog ")):
        assert torch.equal(first.at(step), encoder.text(text))
        assert torch.equal(second.at(step), encoder.text(" red"))


def test_each_distinct_text_is_encoded_once():
    model = Synthetic()
    PromptEncoder(clip(), model, CPU, A1111).prompt("[cat|dog]", 50)
    assert model.calls == 2


def test_short_context_models_chunk_by_their_own_length():
    files = clip_tokenizer_files("<|endoftext|>")
    files["tokenizer_config.json"] = files["tokenizer_config.json"].replace("77", "32")
    encoder = PromptEncoder(Tokenizer(files), Synthetic(), CPU, A1111)
    assert encoder.text("cat " * 61).shape == (1, 96, 8)


# Clip skip


@pytest.mark.parametrize("family", ["sd1", "sd2"])
@torch.no_grad()
def test_clip_skip_counts_as_the_web_uis_do(family):
    """N is the hidden state -N of transformers under the final norm; diffusers' `clip_skip` is N - 1."""
    ours, peer = peers.ours(family), peers.theirs(family)
    ids = peer.tokenizer("a photo of the cat", padding="max_length", return_tensors="pt").input_ids
    states = peer.text_encoder(ids, output_hidden_states=True).hidden_states
    norm = getattr(peer.text_encoder, "text_model", peer.text_encoder).final_layer_norm
    for clip_skip in (1, 2):
        found = ours.encode(["a photo of the cat"], Reading("a1111", clip_skip))
        torch.testing.assert_close(found, norm(states[-clip_skip]), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_clip_skip_is_the_hidden_state_under_the_final_norm():
    peer = tiny.text_encoder()
    ours = TextEncoder(peer.config.to_dict())
    ours.load_state_dict(peer.state_dict())
    ids = torch.tensor([[5, 6, 7, 8]])
    states = peer(ids, output_hidden_states=True).hidden_states
    norm = getattr(peer, "text_model", peer).final_layer_norm
    for skip in range(3):
        torch.testing.assert_close(ours(ids, skip=skip), norm(states[-1 - skip]), rtol=1e-5, atol=1e-5)


def test_there_is_no_such_layer():
    with pytest.raises(UsageError, match="clip skip of 1 \\(none\\) to 3, the layers of the text encoder, found 4"):
        PromptEncoder(clip(), Synthetic(), CPU, Reading("a1111", 4))
