"""What fine-tuning minimizes, as far as options change it."""

import json

import pytest
import torch
from diffusers import DDPMScheduler

from latentdiff import Pipeline
from latentdiff.errors import ConfigError
from latentdiff.training.finetuning.finetune import run
from tests.training.finetuning.build import captioned_folder, model_folder, settings


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    tmp = tmp_path_factory.mktemp("objectives")
    captioned_folder(tmp / "data", 6)
    return tmp / "data"


def logged(run_folder):
    return [json.loads(line) for line in (run_folder / "log.jsonl").read_text().splitlines()]


def test_each_option_changes_the_loss_and_not_what_is_compared(data, tmp_path):
    """`mse` is the plain squared error whatever is minimized; before the first step only noise can change it."""
    first = {}
    for name, more in {
        "plain": {}, "huber": {"loss": "huber"}, "debiased": {"debiased": True}, "pyramid": {"pyramid_noise": 0.4},
    }.items():  # fmt: skip
        out = tmp_path / name
        run(settings(data.parent, out=out, max_steps=1, **more))
        first[name] = next(line for line in logged(out) if "loss" in line)
    assert first["plain"]["loss"] == pytest.approx(first["plain"]["mse"], rel=1e-4)
    for name in ("huber", "debiased"):
        assert first[name]["mse"] == pytest.approx(first["plain"]["mse"], rel=1e-4)
        assert first[name]["loss"] < 0.9 * first["plain"]["loss"]
    assert first["pyramid"]["mse"] != pytest.approx(first["plain"]["mse"], rel=1e-3)


def test_a_model_is_turned_over_to_v_prediction_and_zero_snr(data, tmp_path):
    model = model_folder("epsilon")
    chosen = {"method": "full", "prediction_type": "v_prediction", "zero_snr": True}
    result = run(settings(data.parent, out=tmp_path / "run", model=str(model), max_steps=2, **chosen))
    written = json.loads((result / "scheduler" / "scheduler_config.json").read_text())
    before = json.loads((model / "scheduler" / "scheduler_config.json").read_text())
    changed = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    assert written == before | changed
    pipe = Pipeline.load(result)
    peer = DDPMScheduler.from_pretrained(result / "scheduler").alphas_cumprod
    assert torch.allclose(pipe.schedule.alphas_cumprod.float(), peer, atol=1e-5) and peer[-1] == 0
    assert pipe("a cat", steps=2, progress=False)[0].size == (16, 16)


def test_what_cannot_be_turned_over(data, tmp_path):
    with pytest.raises(ConfigError, match="go with method full"):
        settings(data.parent, zero_snr=True)
    with pytest.raises(ConfigError, match="add --prediction-type v_prediction"):
        run(settings(data.parent, out=tmp_path / "run", model=str(model_folder("epsilon")), method="full", zero_snr=True))
