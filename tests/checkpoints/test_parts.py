"""Parts of a model from elsewhere: VAE, text encoder, and what a file lacks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from latentdiff.checkpoints.components import Components, load_components
from latentdiff.checkpoints.conversion import convert
from latentdiff.checkpoints.inspection import inspect
from latentdiff.errors import CheckpointError
from latentdiff.networks.tiny_vae import TinyVAE, TinyVAEConfig
from tests import peers, tiny
from tests.checkpoints import compvis

PREFIXES = {"unet": "model.diffusion_model.", "vae": "first_stage_model.", "text_encoder": "cond_stage_model."}
EPS = {"prediction_type": "epsilon"}


@pytest.fixture
def whole(tmp_path) -> Path:
    """A tiny SD 1.x as a single file."""
    path = tmp_path / "whole.safetensors"
    save_file(compvis.tensors(compvis.tiny_sd1()), path)
    return path


def cut(whole: Path, *parts: str, prefix: bool = True) -> Path:
    """A file with some of the parts."""
    tensors = {
        name if prefix else name.removeprefix(PREFIXES[part]): tensor
        for name, tensor in load_file(whole).items()
        for part in parts
        if name.startswith(PREFIXES[part])
    }
    path = whole.with_name("-".join((*parts, str(prefix))) + ".safetensors")
    save_file(tensors, path)
    return path


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def agree(a: Components, b: Components) -> None:
    assert all(same(getattr(a, part), getattr(b, part)) for part in PREFIXES)
    assert a.tokenizer("a cat")["input_ids"] == b.tokenizer("a cat")["input_ids"]


@pytest.mark.parametrize("prefix", [True, False])
def test_parts_of_a_file_from_three_files(whole, prefix):
    files = {part: cut(whole, part, prefix=prefix) for part in PREFIXES}
    ours = load_components(files["unet"], vae=files["vae"], text_encoder=files["text_encoder"], **EPS)
    agree(ours, load_components(whole, **EPS))
    assert ours.name == files["unet"].stem and len(ours.hash) == 64


def test_what_a_file_lacks_comes_from_the_base(whole):
    ours = load_components(cut(whole, "unet"), base=whole, **EPS)
    agree(ours, load_components(whole, **EPS))
    ours = load_components(cut(whole, "unet", "text_encoder"), base=whole, **EPS)
    agree(ours, load_components(whole, **EPS))


def test_without_a_base_the_error_names_the_options(whole):
    for parts in (("unet",), ("unet", "text_encoder")):
        with pytest.raises(CheckpointError, match="--vae.*--base"):
            load_components(cut(whole, *parts))
    report = inspect(cut(whole, "unet", "vae"))
    assert "--text-encoder" in report.problem and report.parameters.keys() == {"unet", "vae"}


@pytest.mark.parametrize("form", ["folder of the part", "file in it", "model folder", "original file", "bare original"])
def test_another_vae(tmp_path, whole, form):
    folder = peers.folder("sd1")
    other = tiny.vae(seed=9)
    other.save_pretrained(tmp_path / "other")
    model = shutil.copytree(folder, tmp_path / "model")
    shutil.copytree(tmp_path / "other", model / "vae", dirs_exist_ok=True)
    places = {
        "folder of the part": tmp_path / "other",
        "file in it": tmp_path / "other/diffusion_pytorch_model.safetensors",
        "model folder": model,
    }
    if form in places:
        ours = load_components(folder, vae=places[form])
        expected = load_components(model)
    else:
        vae = cut(whole, "vae", prefix=form == "original file")
        ours, expected = load_components(whole, vae=vae, **EPS), load_components(whole, **EPS)
    assert same(ours.vae, expected.vae) and ours.vae.config == expected.vae.config
    plain = load_components(folder if form in places else whole, **EPS)
    assert same(ours.unet, plain.unet) and ours.hash != plain.hash


def test_another_text_encoder(tmp_path):
    folder = peers.folder("sd1")
    tiny.text_encoder(seed=9).save_pretrained(tmp_path / "other")
    ours, plain = load_components(folder, text_encoder=tmp_path / "other"), load_components(folder)
    assert not same(ours.text_encoder, plain.text_encoder) and same(ours.unet, plain.unet)


def test_what_is_no_such_part(tmp_path, whole):
    for place in (cut(whole, "unet", prefix=False), tmp_path / "none"):
        with pytest.raises(CheckpointError, match="expected a VAE in|no model at"):
            load_components(whole, vae=place)


def test_a_tiny_vae(tmp_path):
    vae = TinyVAE(TinyVAEConfig())
    save_file({f"taesd_{name}": tensor for name, tensor in _published(vae).items()}, tmp_path / "taesd.safetensors")
    ours = load_components(peers.folder("sd1"), vae=tmp_path / "taesd.safetensors")
    assert isinstance(ours.vae, TinyVAE) and same(ours.vae, vae)


def _published(vae: TinyVAE) -> dict[str, torch.Tensor]:
    tensors = {}
    for name, tensor in vae.state_dict().items():
        half, _, place, leaf = name.split(".", 3)
        tensors[f"{half}.{int(place) + (half == 'decoder')}.{leaf}"] = tensor
    return tensors


def test_what_convert_writes_tells_other_programs(tmp_path):
    from safetensors import safe_open

    convert(peers.folder("sd1"), tmp_path / "a.safetensors")
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        about = file.metadata()
    assert about["modelspec.sai_model_spec"] == "1.0.0" and about["modelspec.architecture"] == "stable-diffusion-v1"
    assert about["modelspec.prediction_type"] == "epsilon" and about["modelspec.title"] == "a"
    convert(tmp_path / "a.safetensors", tmp_path / "folder")
    assert not (tmp_path / "folder/original_extras.safetensors").exists()
    assert json.loads((tmp_path / "folder/text_encoder/config.json").read_text())["dtype"] == "float32"
    assert {"vocab.json", "merges.txt"} <= {path.name for path in (tmp_path / "folder/tokenizer").iterdir()}


def test_a_folder_in_half_precision_opens_plainly_in_diffusers(tmp_path):
    from diffusers import DiffusionPipeline

    tensors = compvis.tensors(compvis.tiny_sd1(), dtype=torch.float16)
    save_file(tensors, tmp_path / "a.safetensors")
    convert(tmp_path / "a.safetensors", tmp_path / "folder", prediction_type="epsilon")
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "folder")
    assert {p.dtype for part in (pipe.unet, pipe.text_encoder, pipe.vae) for p in part.parameters()} == {torch.float32}
