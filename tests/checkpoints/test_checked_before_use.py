"""What a model's files say is checked before anything is built or drawn: each error names the file and the value."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import pytest

from latentdiff.checkpoints.components import load_components
from latentdiff.checkpoints.files import read_tensors
from latentdiff.diffusion.config import ScheduleConfig
from latentdiff.diffusion.schedule import Schedule
from latentdiff.errors import CheckpointError, ConfigError, LatentDiffError, UsageError
from tools.fuzzing.readers import tiny_model


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"))


def changed(whole: Path, tmp_path: Path, name: str, **values: object) -> Path:
    """The model with other values in one of its JSON files."""
    shutil.copytree(whole, tmp_path / "model")
    path = tmp_path / "model" / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    return tmp_path / "model"


@pytest.mark.parametrize(
    ("name", "values", "words"),
    [
        ("unet/config.json", {"layers_per_block": 10**4}, "from 1 to 32"),
        ("unet/config.json", {"layers_per_block": 30}, "far more than its"),
        ("unet/config.json", {"block_out_channels": [8] * 5000}, "1 to 12 entries"),
        ("unet/config.json", {"sample_size": {}}, "sample_size"),
        ("unet/config.json", {"in_channels": True}, "in_channels"),
        ("vae/config.json", {"scaling_factor": "x"}, "scaling_factor"),
        ("vae/config.json", {"layers_per_block": -1}, "layers_per_block"),
        ("text_encoder/config.json", {"num_hidden_layers": 10**5}, "from 1 to 256"),
        ("text_encoder/config.json", {"num_hidden_layers": 200}, "far more than its"),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": 10**8}, "num_train_timesteps"),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": 10**10}, "num_train_timesteps"),
        ("scheduler/scheduler_config.json", {"beta_end": 2**31}, "beta_end"),
        ("scheduler/scheduler_config.json", {"beta_start": "x"}, "beta_start"),
        ("scheduler/scheduler_config.json", {"steps_offset": "x"}, "steps_offset"),
        ("scheduler/scheduler_config.json", {"prediction_type": []}, "prediction_type"),
        ("tokenizer/tokenizer_config.json", {"model_max_length": 0}, "model_max_length"),
        ("tokenizer/tokenizer_config.json", {"model_max_length": 2**31}, "model_max_length"),
        ("tokenizer/tokenizer_config.json", {"model_max_length": 17}, "do not fit"),
        ("tokenizer/vocab.json", {"cat</w>": 99_999}, "numbered up to 99999"),
    ],
)
def test_values_that_make_no_sense(whole, tmp_path, name, values, words):
    folder = changed(whole, tmp_path, name, **values)
    start = time.process_time()
    with pytest.raises((CheckpointError, ConfigError), match=words) as error:
        load_components(folder)
    assert time.process_time() - start < 5 and str(error.value).isprintable()


def test_classes_that_are_unknown_are_named(whole, tmp_path):
    folder = changed(whole, tmp_path, "model_index.json", _class_name="StrangePipeline", unet=["mine", "OddNet"])
    with pytest.warns(UserWarning, match="StrangePipeline, unet: OddNet"):
        load_components(folder)


@pytest.mark.parametrize("shard", ["../../secret.safetensors", "/etc/passwd", "a/b.safetensors", "..\\x", "", ".."])
def test_shards_lie_in_their_folder(whole, tmp_path, shard):
    shutil.copytree(whole, tmp_path / "model")
    weights = tmp_path / "model/vae/diffusion_pytorch_model.safetensors"
    names = list(read_tensors(weights).tensors)
    shutil.move(weights, tmp_path / "secret.safetensors")
    index = weights.with_name(weights.name + ".index.json")
    index.write_text(json.dumps({"weight_map": dict.fromkeys(names, shard)}))
    with pytest.raises(CheckpointError, match="expected names of files beside it"):
        load_components(tmp_path / "model")
    for wrong in ([], "x", None, {"a": 1}, {}):
        index.write_text(json.dumps({"weight_map": wrong}))
        with pytest.raises(CheckpointError, match="lists no shards"):
            load_components(tmp_path / "model")


@pytest.mark.parametrize("name", ["", "n" * 5000, "a\0b", "~nobody-of-this-name/x"])
def test_names_that_no_model_can_have(name):
    from latentdiff import Pipeline

    with pytest.raises(LatentDiffError, match="no model at|cannot read|expected"):
        Pipeline.load(name)


def test_schedules_that_leave_no_signal():
    with pytest.raises(ConfigError, match="leaves no signal"):
        Schedule(ScheduleConfig(num_train_timesteps=100_000, beta_end=0.9))


def test_a_short_hash_tells_no_models_apart():
    from latentdiff.cli.reproduce import _same_hash
    from latentdiff.errors import DataError
    from latentdiff.recipe import Recipe

    class Model:
        model_hash = "a" * 64

    def recipe(digits: int) -> Recipe:
        wanted = {
            "prompt": "",
            "seed": 0,
            "steps": 1,
            "sampler": "ddim",
            "guidance_scale": 1.0,
            "width": 8,
            "height": 8,
        }
        return Recipe(**wanted, model_hash="a" * digits)

    with pytest.raises(DataError, match="a model hash of 1 digits"):
        _same_hash(recipe(1), Model())
    assert _same_hash(recipe(10), Model()) and not _same_hash(recipe(0), Model())


def test_a_device_that_is_not_there_leaves_the_model_as_it_is(whole):
    import torch

    from latentdiff import Pipeline

    if torch.cuda.is_available():
        pytest.skip("this machine has one")
    pipe = Pipeline.load(whole, device="cpu")
    with pytest.raises(UsageError, match="no cuda device"):
        pipe.to("cuda")
    assert pipe.device.type == "cpu"
