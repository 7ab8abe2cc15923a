"""The OpenCLIP text encoder against open_clip itself, with a small configuration and random weights."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

open_clip = pytest.importorskip("open_clip", reason="needs the extra openclip")

from latentdiff.errors import ConfigError  # noqa: E402
from latentdiff.networks.open_clip import OpenCLIPTextEncoder  # noqa: E402

# ViT-H-14, the tower of SD 2.x, in small.
SMALL = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 500, "width": 32, "heads": 2, "layers": 4},
}


@pytest.fixture(params=[False, True], ids=["gelu", "quick-gelu"])
def quick_gelu(request: pytest.FixtureRequest) -> bool:
    return request.param


@pytest.fixture
def clip(quick_gelu: bool, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """open_clip's own model, every weight random, known to open_clip by the name "small"."""
    config = copy.deepcopy(SMALL) | {"quick_gelu": quick_gelu}
    monkeypatch.setattr(open_clip, "get_model_config", lambda name: config if name == "small" else None)
    torch.manual_seed(0)
    model = open_clip.model.CLIP(
        embed_dim=config["embed_dim"],
        vision_cfg=open_clip.model.CLIPVisionCfg(**config["vision_cfg"]),
        text_cfg=open_clip.model.CLIPTextCfg(**config["text_cfg"]),
        quick_gelu=quick_gelu,
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
    return model.eval()


@pytest.fixture
def token_ids() -> torch.Tensor:
    """Three prompts of different lengths, padded with zeros as open_clip does."""
    ids = torch.zeros(3, 77, dtype=torch.long)
    generator = torch.Generator().manual_seed(1)
    for row, words in enumerate((1, 12, 75)):
        ids[row, 0], ids[row, words + 1] = 498, 499
        ids[row, 1 : words + 1] = torch.randint(1, 498, (words,), generator=generator)
    return ids


def hidden_state(clip: nn.Module, token_ids: torch.Tensor, layers: int) -> torch.Tensor:
    """open_clip's text stream after `layers` layers, captured where it flows, then its final norm."""
    seen: dict[str, torch.Tensor] = {}
    block = clip.transformer.resblocks[layers - 1]
    handle = block.register_forward_hook(lambda module, args, output: seen.update(x=output))
    try:
        clip.encode_text(token_ids)
    finally:
        handle.remove()
    return clip.ln_final(seen["x"])


@pytest.mark.parametrize("skip_last", [0, 1, 2])
@torch.no_grad()
def test_hidden_states_are_those_of_open_clip(clip: nn.Module, token_ids: torch.Tensor, skip_last: int) -> None:
    encoder = OpenCLIPTextEncoder("small", skip_last=skip_last).eval()
    text = {name: value for name, value in clip.state_dict().items() if not name.startswith("visual.")}
    encoder.load_state_dict(text)
    expected = hidden_state(clip, token_ids, 4 - skip_last)
    torch.testing.assert_close(encoder(token_ids), expected, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_the_layers_differ(clip: nn.Module, token_ids: torch.Tensor) -> None:
    """Otherwise the test above could not tell the penultimate layer from the last."""
    assert (hidden_state(clip, token_ids, 4) - hidden_state(clip, token_ids, 3)).abs().max() > 0.1


def test_a_missing_weight_is_an_error(clip: nn.Module) -> None:
    text = {name: value for name, value in clip.state_dict().items() if not name.startswith("visual.")}
    del text["transformer.resblocks.0.attn.in_proj_weight"]
    with pytest.raises(RuntimeError, match="in_proj_weight"):
        OpenCLIPTextEncoder("small").load_state_dict(text)


def test_shapes_are_told(clip: nn.Module) -> None:
    encoder = OpenCLIPTextEncoder("small")
    assert (encoder.context_length, encoder.embedding_width) == (77, 32)


def test_unknown_architecture(clip: nn.Module) -> None:
    with pytest.raises(ConfigError, match="ViT-X-99"):
        OpenCLIPTextEncoder("ViT-X-99")


def test_vit_h_14_is_the_tower_of_sd_2() -> None:
    with torch.device("meta"):
        encoder = OpenCLIPTextEncoder()
    assert (encoder.context_length, encoder.embedding_width) == (77, 1024)
    assert len(encoder.transformer.resblocks) == 23
