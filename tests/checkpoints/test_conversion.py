"""`convert` there and back: the same tensors bit for bit, for every family, and the configuration with them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from latentdiff.checkpoints.components import load_components
from latentdiff.checkpoints.conversion import convert
from latentdiff.checkpoints.files import read_tensors
from latentdiff.errors import CheckpointError, UsageError
from tests import tiny
from tests.checkpoints import compvis


def assert_bit_equal(one: Path, other: Path) -> None:
    a, b = read_tensors(one).tensors, read_tensors(other).tensors
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and a[name].shape == b[name].shape
        assert torch.equal(
            a[name].view(torch.uint8) if a[name].ndim else a[name],
            b[name].view(torch.uint8) if b[name].ndim else b[name],
        )


def assert_same_folder(one: Path, other: Path) -> None:
    files = sorted(path.relative_to(one) for path in one.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(other) for path in other.rglob("*") if path.is_file())
    for file in files:
        if file.suffix == ".safetensors":
            assert_bit_equal(one / file, other / file)
        elif file.suffix == ".json":
            assert json.loads((one / file).read_text()) == json.loads((other / file).read_text()), file
        else:
            assert (one / file).read_text() == (other / file).read_text()


@pytest.mark.parametrize("folder", [tiny.sd1_folder, tiny.sd2_folder, tiny.inpaint_folder])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_folder_to_file_and_back(tmp_path: Path, folder, dtype: torch.dtype):
    source = folder(tmp_path)
    scheduler = source / "scheduler/scheduler_config.json"
    scheduler.write_text(json.dumps(json.loads(scheduler.read_text()) | {"_guidance_scale": 2.5}))
    for file in source.rglob("*.safetensors"):
        tensors = {name: tensor.to(dtype) for name, tensor in load_file(file).items()}
        # Values that only survive if nothing computes with them.
        tensors[next(iter(tensors))].view(-1)[0] = float("nan")
        save_file(tensors, file)
    assert convert(source, tmp_path / "model.safetensors") == []
    convert(tmp_path / "model.safetensors", tmp_path / "back")
    assert_same_folder(source, tmp_path / "back")


def test_folder_in_older_and_newer_spellings_comes_back_in_them(tmp_path: Path):
    source = tiny.sd2_folder(tmp_path)
    vae, text = source / "vae/diffusion_pytorch_model.safetensors", source / "text_encoder/model.safetensors"
    save_file({name.replace(".to_q.", ".query."): tensor for name, tensor in load_file(vae).items()}, vae)
    names = {name.removeprefix("text_model."): tensor for name, tensor in load_file(text).items()}
    save_file(names | {"embeddings.position_ids": torch.arange(77)[None]}, text)
    convert(source, tmp_path / "model.safetensors")
    convert(tmp_path / "model.safetensors", tmp_path / "back")
    assert_same_folder(source, tmp_path / "back")


@pytest.mark.parametrize("shapes", [compvis.tiny_sd1(), compvis.tiny_sd2(), compvis.with_ema(compvis.tiny_sd1())])
def test_file_to_folder_and_back(tmp_path: Path, shapes: compvis.Shapes):
    tensors = compvis.tensors(shapes, dtype=torch.float16)
    for name in tensors:
        if name.endswith("position_ids"):
            tensors[name] = torch.arange(77)[None]
    save_file(
        tensors, tmp_path / "model.safetensors", metadata={"modelspec.title": "T", "modelspec.prediction_type": "v"}
    )
    convert(tmp_path / "model.safetensors", tmp_path / "folder")
    convert(tmp_path / "folder", tmp_path / "back.safetensors")
    assert_bit_equal(tmp_path / "model.safetensors", tmp_path / "back.safetensors")
    metadata = read_tensors(tmp_path / "back.safetensors").metadata
    assert metadata["modelspec.title"] == "T"
    assert load_components(tmp_path / "back.safetensors").schedule_config.prediction_type == "v_prediction"


def test_ema_weights_can_become_the_weights(tmp_path: Path):
    tensors = compvis.tensors(compvis.with_ema(compvis.tiny_sd1()))
    save_file(tensors, tmp_path / "model.safetensors")
    convert(tmp_path / "model.safetensors", tmp_path / "folder", ema=True)
    saved = load_file(tmp_path / "folder/unet/diffusion_pytorch_model.safetensors")
    assert torch.equal(saved["conv_in.bias"], tensors["model_ema.diffusion_modelinput_blocks00bias"])
    extras = load_file(tmp_path / "folder/original_extras.safetensors")
    assert not any(name.startswith("model_ema.") for name in extras)


def test_clip_vocabulary_is_not_stored_in_the_file(tmp_path: Path):
    save_file(compvis.tensors(compvis.tiny_sd2()), tmp_path / "model.safetensors")
    convert(tmp_path / "model.safetensors", tmp_path / "folder", prediction_type="epsilon")
    assert len(json.loads((tmp_path / "folder/tokenizer/vocab.json").read_text())) == 49408
    convert(tmp_path / "folder", tmp_path / "back.safetensors")
    assert len(read_tensors(tmp_path / "back.safetensors").metadata["latentdiff"]) < 20_000
    convert(tmp_path / "back.safetensors", tmp_path / "again")
    assert_same_folder(tmp_path / "folder", tmp_path / "again")


def test_parts_without_a_place_are_mentioned_and_not_promised(tmp_path: Path):
    source = tiny.sd1_folder(tmp_path)
    index = json.loads((source / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    (source / "model_index.json").write_text(json.dumps(index))
    (source / "safety_checker").mkdir()
    assert convert(source, tmp_path / "model.safetensors") == ["safety_checker left out: the result cannot hold them"]
    convert(tmp_path / "model.safetensors", tmp_path / "back")
    assert json.loads((tmp_path / "back/model_index.json").read_text())["safety_checker"] == [None, None]


def test_guess_is_handed_to_the_user(tmp_path: Path):
    save_file(compvis.tensors(compvis.tiny_sd2()), tmp_path / "model.safetensors")
    (note,) = convert(tmp_path / "model.safetensors", tmp_path / "folder")
    assert "guessed" in note


def test_same_layout_and_pickles_are_refused(tmp_path: Path):
    source = tiny.sd1_folder(tmp_path)
    convert(source, tmp_path / "model.safetensors")
    with pytest.raises(UsageError, match="pickles are read, not written"):
        convert(source, tmp_path / "model.ckpt")
    with pytest.raises(UsageError, match="is a folder already"):
        convert(source, tmp_path / "copy")
    with pytest.raises(UsageError, match="is a single file already"):
        convert(tmp_path / "model.safetensors", tmp_path / "copy.safetensors")
    assert not (tmp_path / "copy").exists() and not (tmp_path / "copy.safetensors").exists()


def test_nothing_is_written_from_a_broken_source(tmp_path: Path):
    source = tiny.sd1_folder(tmp_path)
    shutil.rmtree(source / "vae")
    with pytest.raises(CheckpointError):
        convert(source, tmp_path / "model.safetensors")
    file = tmp_path / "broken.safetensors"
    file.write_bytes(b"<html>")
    with pytest.raises(CheckpointError, match="HTML page"):
        convert(file, tmp_path / "folder")
    assert not (tmp_path / "model.safetensors").exists() and not (tmp_path / "folder").exists()


def test_weights_that_do_not_fit_their_configuration_are_not_converted(tmp_path: Path):
    source = tiny.sd1_folder(tmp_path)
    config = json.loads((source / "vae/config.json").read_text())
    (source / "vae/config.json").write_text(json.dumps({**config, "latent_channels": 8}))
    with pytest.raises(CheckpointError, match="VAE of .* does not fit"):
        convert(source, tmp_path / "model.safetensors")
    assert not (tmp_path / "model.safetensors").exists()
