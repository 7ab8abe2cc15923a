"""Converting ControlNets between the original layout and diffusers' folder: names, types and bits, there and back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from diffusers import ControlNetModel
from safetensors.torch import load_file, save_file

from latentdiff.checkpoints.control import read_control, to_original
from latentdiff.checkpoints.control_layouts import convert_control
from latentdiff.cli import cli
from latentdiff.errors import CheckpointError, UsageError
from tests import peers
from tests.adapters.control.nets import saved
from tests.adapters.control.test_files import in_original_layout, tensors_of


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )


@pytest.mark.parametrize("family", ["sd1", "sd2", "xl"])
def test_a_folder_there_and_back(family, tmp_path):
    folder = saved(tmp_path, family)
    convert_control(folder, tmp_path / "one.safetensors")
    assert all(name.startswith("control_model.") for name in load_file(tmp_path / "one.safetensors"))
    convert_control(tmp_path / "one.safetensors", tmp_path / "again")
    assert same(tensors_of(tmp_path / "again"), tensors_of(folder))
    assert json.loads((tmp_path / "again" / "config.json").read_text()) == json.loads((folder / "config.json").read_text())
    ControlNetModel.from_pretrained(tmp_path / "again")


@pytest.mark.parametrize("prefix", ["control_model.", ""])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_file_there_and_back(prefix, dtype, tmp_path):
    path = in_original_layout(saved(tmp_path), tmp_path / "control.safetensors", prefix=prefix)
    save_file({name: tensor.to(dtype) for name, tensor in load_file(path).items()}, path, {"title": "edges"})
    convert_control(path, tmp_path / "folder")
    convert_control(tmp_path / "folder", tmp_path / "back.safetensors")
    assert same(load_file(tmp_path / "back.safetensors"), load_file(path))
    assert read_control(tmp_path / "back.safetensors").metadata["title"] == "edges"
    assert read_control(tmp_path / "folder").prefix is None and read_control(path).prefix == prefix


def test_a_converted_shuffle_model_pools(tmp_path):
    path = in_original_layout(saved(tmp_path), tmp_path / "control_v11e_sd15_shuffle.safetensors")
    convert_control(path, tmp_path / "folder")
    convert_control(tmp_path / "folder", tmp_path / "plain-name.safetensors")
    assert read_control(tmp_path / "folder").config.pools and read_control(tmp_path / "plain-name.safetensors").config.pools


def test_differences_need_their_model(tmp_path):
    base = peers.theirs("sd1").unet.state_dict()
    control = read_control(saved(tmp_path))
    less = {name: t - base[name] if name in base else t.clone() for name, t in control.tensors.items()}
    path = tmp_path / "diff.safetensors"
    save_file(to_original(less, control.config) | {"difference": torch.tensor(1.0)}, path)
    with pytest.raises(UsageError, match="--base MODEL"):
        convert_control(path, tmp_path / "folder")
    convert_control(path, tmp_path / "folder", peers.folder("sd1"))
    for name, tensor in tensors_of(tmp_path / "folder").items():
        torch.testing.assert_close(tensor, control.tensors[name], rtol=0, atol=1e-6)


def refused(source: Path, target: Path, **how) -> str:
    with pytest.raises((UsageError, CheckpointError)) as error:
        convert_control(source, target, **how)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_what_is_refused(tmp_path):
    folder = saved(tmp_path)
    path = in_original_layout(folder, tmp_path / "control.safetensors")
    assert "original layout already" in refused(path, tmp_path / "other.safetensors")
    assert "diffusers folder already" in refused(folder, tmp_path / "other")
    assert "pickles are read, not written" in refused(folder, tmp_path / "other.pth")
    assert "leave out --base" in refused(path, tmp_path / "other", base=peers.folder("sd1"))
    assert "expected a ControlNet" in refused(peers.folder("sd1") / "unet", tmp_path / "x.safetensors")
    full = tmp_path / "full"
    full.mkdir()
    (full / "letter.txt").write_text("mine")
    assert "refusing to replace" in refused(path, full) and (full / "letter.txt").exists()


def test_the_command(tmp_path):
    folder = saved(tmp_path)
    run = lambda *words: CliRunner().invoke(cli, [str(word) for word in words])  # noqa: E731
    done = run("control", "convert", folder, tmp_path / "one.safetensors")
    assert done.exit_code == 0, done.output
    assert "in the names of the original code" in run("inspect", tmp_path / "one.safetensors").output
    assert "in the names of diffusers" in run("inspect", folder).output
