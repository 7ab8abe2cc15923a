"""A single file in SD 2.x's layout, its text tower saved by open_clip itself, read as the CLIP of the diffusers
layout."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

open_clip = pytest.importorskip("open_clip", reason="needs the extra openclip")

from latentdiff.checkpoints.components import load_components  # noqa: E402
from latentdiff.checkpoints.conversion import convert  # noqa: E402
from tests import tiny  # noqa: E402

TEXT = "cond_stage_model.model."


@pytest.fixture
def clip() -> nn.Module:
    """open_clip's model with one text layer more than SD 2.x reads, every weight random."""
    vocabulary, _ = tiny.tokenizer_vocabulary()
    torch.manual_seed(0)
    width = tiny.CROSS_ATTENTION_DIM
    model = open_clip.model.CLIP(
        embed_dim=16,
        vision_cfg=open_clip.model.CLIPVisionCfg(image_size=32, layers=1, width=32, head_width=16, patch_size=16),
        text_cfg=open_clip.model.CLIPTextCfg(vocab_size=len(vocabulary), width=width, heads=4, layers=3),
    )
    return tiny.randomize(model, 0)


@pytest.fixture
def single_file(clip: nn.Module, tmp_path: Path) -> Path:
    """A tiny SD 2.x file whose text tower is replaced by `clip`'s."""
    path = tmp_path / "sd2.safetensors"
    convert(tiny.sd2_folder(tmp_path), path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys() if not name.startswith(TEXT)}  # noqa: SIM118
    tower = {name: value for name, value in clip.state_dict().items() if not name.startswith("visual.")}
    tensors |= {TEXT + name: value.contiguous() for name, value in tower.items()}
    save_file(tensors, path, metadata)
    return path


@torch.no_grad()
def test_text_encoder_is_open_clips_at_the_penultimate_layer(single_file: Path, clip: nn.Module) -> None:
    components = load_components(single_file)
    ids = torch.tensor(components.tokenizer(["a red cat", ""], padding="max_length")["input_ids"])

    seen: dict[str, torch.Tensor] = {}
    clip.transformer.resblocks[1].register_forward_hook(lambda module, args, output: seen.update(x=output))
    clip.encode_text(ids)
    expected = clip.ln_final(seen["x"])

    torch.testing.assert_close(components.text_encoder(ids), expected, rtol=1e-5, atol=1e-5)
    assert expected.std() > 0.1


def test_back_to_a_single_file_is_bit_equal(single_file: Path, tmp_path: Path) -> None:
    """The layer that SD 2.x does not read, and the projection, come through as well."""
    again = tmp_path / "again.safetensors"
    convert(single_file, tmp_path / "folder")
    convert(tmp_path / "folder", again)
    with safe_open(single_file, "pt") as first, safe_open(again, "pt") as second:
        lost = set(first.keys()) - set(second.keys())
        assert lost == set() and set(second.keys()) <= set(first.keys())
        # noqa: SIM118
        assert all(torch.equal(first.get_tensor(name), second.get_tensor(name)) for name in first.keys())
