"""A whole run as the embedded model's: started from other weights, the text encoder taught first, close-ups, Muon."""

import json
from dataclasses import replace

import pytest
import torch

from latentdiff.checkpoints.components import load_components
from latentdiff.errors import CheckpointError, ConfigError
from latentdiff.training.stages.config import validate_config
from latentdiff.training.stages.networks import WEIGHTS_FILE, new_unet, new_vae, take_weights
from latentdiff.training.stages.train import train
from tests.training.build import config, prepared

RESOLUTION = 32


def with_scenes(folder):
    """Say of each image what `captioned_folder` drew: one thing, here in the upper left quarter."""
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    for row in rows:
        noun, box = row["text"].split()[-1], [2, 2, 14, 14]
        thing = {"noun": noun, "colour": None, "size": None, "box": box, "text": f"a small {noun}"}
        row["scene"] = {"background": "red", "relation": None, "objects": [thing]}
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    tmp = prepared(tmp_path_factory.mktemp("embedded"))
    for name in ("train", "held-out"):
        with_scenes(tmp / name)
    text = {
        "max_steps": 6,
        "batch_size": 4,
        "lr": 1e-2,
        "mixed_precision": "no",
        "log_every": 2,
        "validation_images": 4,
    }
    settings = config(
        tmp,
        data={"resolution": RESOLUTION},
        text=text,
        model={**config(tmp).model.model_dump(mode="json"), "unet": unet_of(config(tmp))},
        diffusion={"optimizer": "muon", "close_up_share": 0.5},
    )
    return settings, train(settings)


def unet_of(settings):
    unet = settings.model.model_dump(mode="json")["unet"]
    return {**unet, "sample_size": RESOLUTION // settings.model.vae.downscale}


def log_of(settings, stage):
    return [json.loads(line) for line in (settings.run / stage / "log.jsonl").read_text().splitlines()]


def test_one_call_makes_the_model(run):
    settings, folder = run
    assert load_components(folder).unet.config.sample_size == 8
    assert any("right_noun_1" in entry for entry in log_of(settings, "text"))
    assert all(entry["loss"] > 0 for entry in log_of(settings, "diffusion") if "loss" in entry)


def test_a_run_may_start_from_the_weights_of_another(run, tmp_path):
    settings, folder = run
    unet = new_unet(settings.model.unet, seed=5)
    take_weights(unet, folder / "unet" / WEIGHTS_FILE, "model.unet")
    loaded = load_components(folder)
    for name, value in loaded.unet.state_dict().items():
        torch.testing.assert_close(unet.state_dict()[name], value)
    vae = new_vae(settings.model.vae, folder / "vae", seed=5)
    assert vae.config.scaling_factor == 1.0
    for name, value in loaded.vae.state_dict().items():
        torch.testing.assert_close(vae.state_dict()[name], value)


def test_a_run_may_go_on_with_another_model(run, tmp_path):
    """VAE and text encoder as they are, no stage for either."""
    settings, folder = run
    before = load_components(folder)
    going_on = settings.model_copy(
        update={
            "run": tmp_path / "run",
            "text": None,
            "vae": settings.vae.model_copy(update={"start": folder / "vae", "max_steps": 0}),
            "diffusion": settings.diffusion.model_copy(update={"start": folder, "max_steps": 1, "lr": 1e-9}),
        }
    )
    after = load_components(train(going_on))
    assert after.vae.config.scaling_factor == before.vae.config.scaling_factor
    for part in ("vae", "unet", "text_encoder"):
        for name, value in getattr(before, part).state_dict().items():
            torch.testing.assert_close(getattr(after, part).state_dict()[name], value, atol=1e-6, rtol=0)


def test_taking_a_vae_as_it_is_needs_one(run):
    settings, _ = run
    values = settings.model_dump(mode="json")
    values["vae"] |= {"max_steps": 0, "start": None}
    with pytest.raises(ConfigError, match="max_steps 0 needs start"):
        validate_config(values, "test")


def test_weights_of_another_shape_are_refused(run):
    settings, folder = run
    wider = replace(settings.model.unet, layers_per_block=2)
    with pytest.raises(CheckpointError, match="another configuration"):
        take_weights(new_unet(wider, 0), folder / "unet" / WEIGHTS_FILE, "model.unet")
    with pytest.raises(CheckpointError, match="expected a trained VAE"):
        new_vae(settings.model.vae, folder / "nothing", 0)
