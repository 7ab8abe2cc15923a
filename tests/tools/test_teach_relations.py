from __future__ import annotations

import pytest
import torch

from latentdiff.checkpoints.embedded import embedded_model
from latentdiff.networks.text_encoder import TextEncoder
from latentdiff.training.stages.networks import load_tokenizer
from tests.scenes import scene_language

import teach_relations  # isort: skip  (found by tests.scenes)

RELATIONS = list(scene_language.RELATIONS)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(embedded_model() / "tokenizer", 32)


def test_places_are_those_of_the_words(tokenizer):
    captions = teach_relations.relation_captions(tokenizer, 200, seed=0)
    words = {"left of": ("left",), "right of": ("right",), "above": ("above", "over"), "below": ("below", "under")}
    for tokens, second, between, relation, first in zip(
        captions.tokens, captions.second, captions.between, captions.relation, captions.first_noun, strict=True
    ):
        said = tokenizer.decode(tokens[1 : between + 1])
        assert said.endswith(words[RELATIONS[relation]])
        assert list(scene_language.NOUNS)[first] in said
        rest = tokenizer.decode(tokens[between + 1 : second + 1])
        assert rest.split()[-1] in scene_language.NOUNS


def test_teaching_tells_relations_apart_and_keeps_the_rest(tokenizer):
    torch.manual_seed(0)
    size = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    encoder = TextEncoder({**size, **special, "max_position_embeddings": 32, "vocab_size": len(tokenizer)}).eval()
    captions = teach_relations.relation_captions(tokenizer, 400, seed=0)
    others = teach_relations.other_captions(tokenizer, 200, seed=0)
    before = encoder(others[:8]).detach()
    first = teach_relations.teach(encoder, captions, others, 1, seed=0)
    last = teach_relations.teach(encoder, captions, others, 60, seed=0)
    assert last["between"] < 0.6 * first["between"]
    assert torch.nn.functional.mse_loss(encoder(others[:8]), before) < 0.2 * before.var()
