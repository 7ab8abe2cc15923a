"""`inspect` names whatever it is given, and executes nothing."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from PIL import Image, PngImagePlugin
from safetensors.torch import load_file, save_file

from latentdiff.checkpoints.components import load_components
from latentdiff.checkpoints.conversion import convert
from latentdiff.checkpoints.embedded import embedded_model
from latentdiff.checkpoints.inspection import inspect
from latentdiff.errors import CheckpointError
from latentdiff.image import save_image
from tests import tiny
from tests.checkpoints import compvis
from tests.checkpoints.test_files import Evil


def check(report, **expected: object) -> None:
    """Compare some fields; every report can be printed and is JSON."""
    facts = json.loads(report.to_json())
    assert {name: facts[name] for name in expected} == expected
    assert report.path in str(report) and report.kind in str(report)


def test_folder(tmp_path: Path):
    folder = tiny.sd2_folder(tmp_path)
    report = inspect(folder)
    check(report, kind="diffusers folder", prediction_type="v_prediction", ema=None, problem="")
    assert report.family.startswith("Stable Diffusion 2.x")
    assert report.parameters["unet"] == sum(p.numel() for p in load_components(folder).unet.parameters())
    assert report.dtypes == {"float32": sum(report.parameters.values())}
    assert report.sha256 == load_components(folder).hash and report.short_hash == report.sha256[:10]


def test_single_file_has_the_hash_that_web_uis_show(tmp_path: Path):
    import hashlib

    path = tmp_path / "model.safetensors"
    save_file(compvis.tensors(compvis.with_ema(compvis.tiny_sd1(in_channels=9)), dtype=torch.float16), path)
    report = inspect(path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    check(report, kind="original single file (safetensors)", ema=True, prediction_type="epsilon", problem="")
    check(report, sha256=digest, short_hash=digest[:10], bytes=path.stat().st_size)
    assert "1.x inpainting" in report.family and report.dtypes.keys() == {"float16"}


def test_more_latent_channels_are_no_condition():
    assert inspect(embedded_model()).family == "Stable Diffusion 1.x, a size of its own"


def test_averaged_weights_of_a_converted_folder_are_mentioned(tmp_path: Path):
    save_file(compvis.tensors(compvis.with_ema(compvis.tiny_sd1())), tmp_path / "model.safetensors")
    convert(tmp_path / "model.safetensors", tmp_path / "folder")
    assert "averaged weights" in inspect(tmp_path / "folder").notes[0]


def test_folder_with_a_senseless_configuration_has_a_problem(tmp_path: Path):
    folder = tiny.sd1_folder(tmp_path)
    (folder / "unet/config.json").write_text('{"block_out_channels": 7}')
    assert "makes no sense" in inspect(folder).problem


def test_published_sizes_have_their_plain_names():
    from latentdiff.checkpoints.architecture import identify

    assert identify(compvis.unet() | compvis.vae() | compvis.clip()).family == "Stable Diffusion 1.x"
    second = compvis.unet(context=1024, linear=True) | compvis.vae() | compvis.open_clip()
    assert identify(second).family == "Stable Diffusion 2.x"


def test_ckpt(tmp_path: Path):
    path = tmp_path / "model.ckpt"
    torch.save({"state_dict": compvis.tensors(compvis.tiny_sd2()), "global_step": 875_000}, path)
    check(inspect(path), kind="original single file (pickle)", prediction_type="epsilon", ema=False, problem="")


def test_guess_is_called_one(tmp_path: Path):
    save_file(compvis.tensors(compvis.tiny_sd2()), tmp_path / "model.safetensors")
    report = inspect(tmp_path / "model.safetensors")
    assert report.prediction_type == "v_prediction" and "guessed" in report.notes[0] and "guessed" in str(report)


def test_pickle_with_code_is_described_not_run(tmp_path: Path):
    trace, path = tmp_path / "it ran", tmp_path / "model.ckpt"
    torch.save({"state_dict": {}, "evil": Evil(f"touch '{trace}'")}, path)
    report = inspect(path)
    check(report, kind="torch archive")
    assert f"{os.system.__module__}.system" in report.problem and not trace.exists()


@pytest.mark.parametrize(
    ("names", "dialect", "parts"),
    [
        (
            ("lora_unet_down_blocks_0.lora_down.weight", "lora_te_text_model.lora_down.weight"),
            "kohya",
            ["text_encoder", "unet"],
        ),
        (("unet.down_blocks.0.to_q.lora_A.weight",), "peft", ["unet"]),
        (("unet.down_blocks.0.processor.to_q_lora.down.weight",), "diffusers", ["unet"]),
    ],
)
def test_lora(tmp_path: Path, names: tuple[str, ...], dialect: str, parts: list[str]):
    path = tmp_path / "adapter.safetensors"
    save_file({name: torch.zeros(4, 16) for name in names}, path, metadata={"ss_sd_model_name": "base.ckpt"})
    report = inspect(path)
    check(report, kind="LoRA (safetensors)", problem="")
    expected = {"names": dialect, "rank": [4], "layers": len(names), "parts": parts, "base": "base.ckpt"}
    assert report.lora == {"kinds": ["LoRA"], **expected}


def test_parts_and_tokenizer(tmp_path: Path):
    folder = tiny.sd1_folder(tmp_path)
    for place in (folder / "vae", folder / "vae/diffusion_pytorch_model.safetensors"):
        report = inspect(place)
        assert "part of a model" in report.kind and report.family == "VAE (diffusers layout)"
        assert report.parameters == {
            "vae": sum(
                t.numel()
                for t in load_file(place / "diffusion_pytorch_model.safetensors" if place.is_dir() else place).values()
            )
        }
    check(inspect(folder / "tokenizer"), kind="tokenizer folder", problem="")
    save_file(compvis.tensors(compvis.vae(width=32, mults=(1, 1), prefix="")), tmp_path / "vae.safetensors")
    check(inspect(tmp_path / "vae.safetensors"), family="VAE (original layout)")


def test_converted_file_tells_its_own_configuration(tmp_path: Path):
    convert(tiny.sd2_folder(tmp_path), tmp_path / "model.safetensors")
    check(inspect(tmp_path / "model.safetensors"), prediction_type="v_prediction", notes=[], problem="")


def test_images(tmp_path: Path):
    chunks = PngImagePlugin.PngInfo()
    chunks.add_itxt("parameters", "a fox")
    chunks.add_itxt("latentdiff", "{}")
    Image.new("RGB", (8, 6)).save(tmp_path / "with.png", pnginfo=chunks)
    Image.new("RGB", (8, 6)).save(tmp_path / "without.png")
    check(
        inspect(tmp_path / "with.png"),
        kind="PNG image",
        family="8x6 pixels",
        notes=["recipe present (latentdiff, parameters)"],
    )
    check(inspect(tmp_path / "without.png"), notes=["no recipe in it"])
    (tmp_path / "cut.png").write_bytes((tmp_path / "with.png").read_bytes()[:40])
    assert "damaged" in inspect(tmp_path / "cut.png").problem


@pytest.mark.parametrize(("suffix", "kind"), [("jpg", "JPEG"), ("webp", "WebP"), ("avif", "AVIF"), ("tif", "TIFF")])
def test_images_of_other_formats(tmp_path: Path, suffix: str, kind: str):
    image, path = Image.new("RGB", (8, 6)), tmp_path / f"a.{suffix}"
    image.info = {"parameters": "a fox", "latentdiff": "{}"}
    image.save(path) if suffix == "tif" else save_image(image, path)
    note = "no recipe in it" if suffix == "tif" else "recipe present (latentdiff, parameters)"
    check(inspect(path), kind=f"{kind} image", family="8x6 pixels", notes=[note], problem="")


@pytest.mark.parametrize(
    ("content", "kind"),
    [(b"", "empty file"), (b"<html>", "HTML page"), (b"garbage" * 9, "file of unknown format"), (b"{}", "JSON file")],
)
def test_garbage(tmp_path: Path, content: bytes, kind: str):
    (tmp_path / "thing").write_bytes(content)
    report = inspect(tmp_path / "thing")
    check(report, kind=kind)
    assert report.problem


def test_truncated_and_unfitting_models_have_a_problem(tmp_path: Path):
    path = tmp_path / "model.safetensors"
    tensors = compvis.tensors(compvis.tiny_sd1())
    save_file(tensors, path)
    path.write_bytes(path.read_bytes()[:-5])
    assert "truncated" in inspect(path).problem
    del tensors["model.diffusion_model.out.0.bias"]
    save_file(tensors, path)
    report = inspect(path)
    assert "1 missing: model.diffusion_model.out.0.bias" in report.problem and report.parameters["vae"] > 0


def test_other_folders(tmp_path: Path):
    (tmp_path / "notes.txt").write_text("x")
    report = inspect(tmp_path)
    check(report, kind="folder without a model")
    assert "notes.txt" in report.problem


def test_nothing_there(tmp_path: Path):
    with pytest.raises(CheckpointError, match="no model at"):
        inspect(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.pt", {"string_to_param": {"*": torch.zeros(4, 32)}, "name": "x"}),
        ("a.bin", {"<teapot>": torch.zeros(32)}),
        ("b.pt", {"emb_params": torch.zeros(2, 32)}),
    ],
)
def test_embeddings(tmp_path: Path, name: str, content: dict):
    torch.save(content, tmp_path / name)
    report = inspect(tmp_path / name)
    check(report, kind="textual inversion (pickle)", family="textual-inversion embedding", problem="")


def test_a_single_difference_is_no_word(tmp_path: Path):
    save_file({"lora_unet_conv_in.diff": torch.zeros(4, 4)}, tmp_path / "a.safetensors")
    report = inspect(tmp_path / "a.safetensors")
    assert report.kind == "LoRA (safetensors)" and report.lora["kinds"] == ["full difference"]
