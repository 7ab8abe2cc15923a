from __future__ import annotations

import sys

import pytest
import torch
from torch import nn
from transformers import CLIPTextModel

from latentdiff.errors import ConfigError, MissingDependencyError, UsageError
from latentdiff.networks.open_clip import OpenCLIPTextEncoder
from latentdiff.networks.text_encoder import TextEncoder, disk_names
from tests import tiny

IDS = torch.randint(0, 500, (2, 77), generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=["sd1", "sd2"])  # quick GELU; GELU
def peer(request):
    return {"sd1": tiny.text_encoder, "sd2": tiny.sd2_text_encoder}[request.param]()


@torch.no_grad()
def test_same_embeddings_as_transformers(peer):
    encoder = TextEncoder(peer.config.to_dict())
    encoder.load_state_dict(peer.state_dict())
    assert_equal(encoder(IDS), peer(IDS).last_hidden_state)
    assert_equal(encoder(IDS[:, :20]), peer(IDS[:, :20]).last_hidden_state)


def assert_equal(ours, theirs, tolerance=1e-6):
    """Relative to the largest entry."""
    torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance * float(theirs.abs().max()))


def test_same_gradients_as_transformers(peer):
    encoder = TextEncoder(peer.config.to_dict())
    encoder.load_state_dict(peer.state_dict())
    weights = torch.randn(2, 77, peer.config.hidden_size, generator=torch.Generator().manual_seed(1))
    (encoder(IDS) * weights).sum().backward()
    (peer(IDS).last_hidden_state * weights).sum().backward()
    expected = disk_names({name: parameter.grad for name, parameter in peer.named_parameters()})
    for name, parameter in encoder.named_parameters():
        assert_equal(parameter.grad, expected[name], 1e-5)


def test_new_weights_are_drawn_as_those_of_transformers():
    config = tiny.text_encoder().config
    torch.manual_seed(0)
    ours, theirs = (disk_names(made.state_dict()) for made in (TextEncoder(config.to_dict()), CLIPTextModel(config)))
    for name, value in theirs.items():
        std = float(value.std())
        assert float(ours[name].std()) == pytest.approx(std, rel=0.2, abs=1e-9), name
        assert float(ours[name].mean()) == pytest.approx(float(value.mean()), abs=0.2 * std), name


def test_names_are_those_on_disk(peer):
    names = TextEncoder(peer.config.to_dict()).state_dict().keys()
    assert {"text_model.embeddings.token_embedding.weight", "text_model.final_layer_norm.bias"} <= names
    assert names == disk_names(peer.state_dict()).keys()


@torch.no_grad()
def test_built_on_meta_and_loaded_without_a_copy(peer):
    with torch.device("meta"):
        encoder = TextEncoder(peer.config.to_dict())
    assert all(parameter.is_meta for parameter in encoder.parameters())
    state = disk_names(peer.state_dict())
    encoder.load_state_dict(state, assign=True)
    encoder.to(torch.float64).float()  # nothing is left on meta
    assert_equal(encoder(IDS), peer(IDS).last_hidden_state)


@pytest.mark.parametrize("prefix", ["", "text_model."])
def test_position_ids_and_the_missing_level_are_no_fault(peer, prefix):
    plain = {name.removeprefix("text_model."): value for name, value in peer.state_dict().items()}
    state = {prefix + name: value for name, value in plain.items()}
    state[prefix + "embeddings.position_ids"] = torch.arange(77)[None]
    names = list(state)
    TextEncoder(peer.config.to_dict()).load_state_dict(state)
    assert list(state) == names  # the caller's dictionary stays as it is


def test_missing_and_unexpected_keys_are_errors(peer):
    encoder, state = TextEncoder(peer.config.to_dict()), disk_names(peer.state_dict())
    with pytest.raises(RuntimeError, match="Missing key.*final_layer_norm"):
        encoder.load_state_dict({name: value for name, value in state.items() if "final" not in name})
    with pytest.raises(RuntimeError, match="Unexpected key.*text_model.extra"):
        encoder.load_state_dict(state | {"extra": torch.zeros(1)})


def test_is_found_as_part_of_a_larger_module(peer):
    both = nn.ModuleDict({"text_encoder": TextEncoder(peer.config.to_dict()), "other": nn.Linear(2, 2)})
    both.load_state_dict(both.state_dict())


def test_is_trainable_from_nothing():
    torch.manual_seed(0)
    encoder = TextEncoder({"vocab_size": 50, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
                           "num_attention_heads": 2, "max_position_embeddings": 12})  # fmt: skip
    assert encoder.context_length == 12 and encoder.embedding_width == 16
    assert 0.015 < encoder.text_model.embeddings.token_embedding.weight.std() < 0.025  # CLIP's initialisation
    encoder(torch.randint(0, 50, (3, 12))).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in encoder.parameters())


def test_a_token_does_not_see_later_ones(peer):
    encoder = TextEncoder(peer.config.to_dict())
    changed = IDS.clone()
    changed[:, 10:] = 3
    with torch.no_grad():
        assert torch.allclose(encoder(IDS)[:, :10], encoder(changed)[:, :10], atol=1e-6)
        assert not torch.allclose(encoder(IDS)[:, 10:], encoder(changed)[:, 10:], atol=1e-3)


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "t5"},
        {"hidden_size": 10, "num_attention_heads": 3},
        {"hidden_act": "nope"},
        {"num_hidden_layers": "2"},
        {"vocab_size": 0},
        {"layer_norm_eps": -1.0},
    ],
)
def test_bad_configuration(config):
    with pytest.raises(ConfigError):
        TextEncoder({"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, **config})


@pytest.mark.parametrize("shape", [(77,), (1, 78)])
def test_bad_token_ids(peer, shape):
    with pytest.raises(UsageError, match="L at most 77"):
        TextEncoder(peer.config.to_dict())(torch.zeros(shape, dtype=torch.long))


def test_open_clip_missing_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'latentdiff\[openclip\]'"):
        OpenCLIPTextEncoder()
