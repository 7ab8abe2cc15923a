"""Depths by a model of transformers, against its own pipeline."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from transformers import DPTConfig, DPTForDepthEstimation, DPTImageProcessorPil, pipeline

from latentdiff.adapters.control.depth import DepthModel
from latentdiff.cli import cli
from latentdiff.errors import CheckpointError
from tests import tiny
from tests.tasks.images import an_image


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny DPT with random weights."""
    torch.manual_seed(0)
    config = DPTConfig(
        hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=8,
        backbone_out_indices=[0, 1, 2, 3], neck_hidden_sizes=[8, 8, 8, 8], fusion_hidden_size=8, is_hybrid=False,
    )  # fmt: skip
    place = tmp_path_factory.mktemp("depth")
    tiny.randomize(DPTForDepthEstimation(config), 1).save_pretrained(place)
    DPTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(place)
    return place


def test_depths_are_those_of_transformers(folder):
    image = an_image(96, 64)
    expected = pipeline("depth-estimation", model=str(folder), device="cpu")(image)["depth"]
    found = np.asarray(DepthModel.load(folder)(image)).astype(int)
    assert found.shape == (64, 96, 3) and found.min() == 0 and found.max() == 255
    assert np.abs(found[..., 0] - np.asarray(expected).astype(int)).max() <= 1


def test_models_of_metres_are_turned_round(folder):
    model, image = DepthModel.load(folder), an_image(96, 64)
    near = np.asarray(model(image))[..., 0].astype(int)
    model._network.config.depth_estimation_type = "metric"
    metric = np.asarray(model(image))[..., 0].astype(int)
    assert metric[near == 255].mean() < metric[near == 0].mean()


def test_the_command(folder, tmp_path):
    run = lambda *words: CliRunner().invoke(cli, ["control", "prepare", *map(str, words)])  # noqa: E731
    an_image(96, 64).save(tmp_path / "photo.png")
    done = run("depth", tmp_path / "photo.png", "--model", folder, "--out", tmp_path / "depth.png")
    assert done.exit_code == 0, done.output
    assert Image.open(tmp_path / "depth.png").size == (96, 64)
    for words in (["depth"], ["canny", "--model", folder]):
        done = run(*words, tmp_path / "photo.png", "--out", tmp_path / "no.png")
        assert done.exit_code and "expected --model FOLDER with depth" in str(done.exception or done.output)
    done = run("pose", tmp_path / "photo.png", "--out", tmp_path / "no.png")
    assert done.exit_code and "OpenposeDetector" in str(done.exception or done.output)


def test_what_is_no_depth_model(tmp_path):
    with pytest.raises(CheckpointError, match="a depth model of transformers") as error:
        DepthModel.load(tmp_path)
    assert "\n" not in str(error.value)
