"""Whole runs: every stage, cut off and resumed, on one process and on two, down to the model folder."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from latentdiff.checkpoints.components import load_components
from latentdiff.cli import run as run_command
from latentdiff.errors import CheckpointError, DataError, UsageError
from latentdiff.image import open_image
from latentdiff.pipeline import Pipeline
from latentdiff.recipe import read_recipe
from latentdiff.training.checkpoint import load_checkpoint, newest_checkpoint
from latentdiff.training.stages.train import export, train
from tests.training.build import captioned_folder, config, prepared, values

ROOT = Path(__file__).parents[3]


def state_of(stage):
    checkpoint = load_checkpoint(newest_checkpoint(stage / "checkpoints")[0])
    averages = {f"ema {name}": value for name, value in checkpoint.ema.items()}
    return checkpoint.step, {**checkpoint.weights, **averages, **checkpoint.optimizer}


def assert_same(first, second, **tolerance):
    (first_step, first), (second_step, second) = first, second
    assert first_step == second_step and first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(
            first[name], second[name], **(tolerance or {"rtol": 0, "atol": 0}), msg=lambda m, n=name: f"{n}: {m}"
        )


def losses(stage):
    entries = map(json.loads, (stage / "log.jsonl").read_text().splitlines())
    return [entry["loss"] for entry in entries if "loss" in entry]


def command(tmp, settings, *arguments, launcher=(sys.executable, "-m")):
    """The command line of a training process on the CPU, one thread."""
    path = tmp / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    return {"args": [*launcher, "latentdiff", "train", str(path), *arguments], "env": environment}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run with all stages, trained long enough to learn something, and the previews that it asked for."""
    tmp = prepared(tmp_path_factory.mktemp("finished"), images=24)
    learning = {"batch_size": 8, "log_every": 20, "ema_decay": 0.9}
    settings = config(
        tmp,
        vae={**learning, "max_steps": 80, "lr": 1e-2, "crop": 16, "preview_every": 40},
        decoder={**values(tmp)["vae"], "max_steps": 4},
        diffusion={
            **learning,
            "max_steps": 160,
            "lr": 3e-3,
            "preview_every": 80,
            "min_snr_gamma": None,
            "sample_count": 2,
            "sample_steps": 2,
        },
    )
    return settings, train(settings)


def test_both_stages_learn(finished):
    settings, _ = finished
    for stage in ("vae", "diffusion"):
        curve = losses(settings.run / stage)
        assert curve[-1] < 0.85 * curve[0], curve


def test_the_model_folder_holds_the_averages(finished):
    settings, folder = finished
    components = load_components(folder)
    average = load_checkpoint(newest_checkpoint(settings.run / "diffusion" / "checkpoints")[0]).ema
    assert torch.equal(components.unet.conv_out.weight, average["unet.conv_out.weight"])
    state = components.text_encoder.state_dict()
    assert state and all(torch.equal(value, average[f"text_encoder.{name}"]) for name, value in state.items())
    assert components.schedule_config == settings.model.schedule
    assert components.vae.config.scaling_factor != 1.0


def test_the_decoder_stage_keeps_the_encoder(finished):
    settings, folder = finished
    name = "diffusion_pytorch_model.safetensors"
    before, after = (load_file(settings.run / stage / "final" / name) for stage in ("vae", "decoder"))
    changed = {key.split(".")[0] for key in before if not torch.equal(before[key], after[key])}
    assert changed == {"decoder", "post_quant_conv"}
    configs = [json.loads((settings.run / stage / "final" / "config.json").read_text()) for stage in ("vae", "decoder")]
    assert configs[0] == configs[1]
    assert torch.equal(load_file(folder / "vae" / name)["decoder.conv_in.weight"], after["decoder.conv_in.weight"])


def test_the_model_folder_opens_in_diffusers(finished):
    from diffusers import StableDiffusionPipeline

    _, folder = finished
    pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    image = pipe("a photo of the cat", num_inference_steps=2, output_type="np").images[0]
    assert image.shape == (16, 16, 3) and np.isfinite(image).all()


def test_samples_are_drawn_with_the_averaged_model(finished):
    settings, folder = finished
    stage = settings.run / "diffusion"
    images = sorted(str(path.relative_to(stage)) for path in stage.rglob("samples/*/*/*.png"))
    assert images == [
        f"samples/step-{step:08d}/ema/{name}.png" for step in (80, 160) for name in ("00", "01", "sheet")
    ]
    drawn = open_image(stage / images[-3])
    recipe = read_recipe(drawn.info)
    again = Pipeline.load(folder, device="cpu")(
        recipe.prompt, seed=recipe.seed, steps=2, guidance_scale=5.0, progress=False
    )
    assert np.abs(np.asarray(again[0], int) - np.asarray(drawn, int)).max() <= 1
    assert (settings.run / "vae" / "previews" / "step-00000040.png").is_file()


def test_the_report_tells_of_every_stage(finished):
    settings, _ = finished
    page = (settings.run / "report.html").read_text()
    assert [f"<h1>{stage}</h1>" in page for stage in ("vae", "decoder", "diffusion")] == [True] * 3
    assert "Reconstructions" in page and "Samples" in page and "a photo of the" in page
    summary = json.loads((settings.run / "diffusion" / "data.json").read_text())
    assert (summary["images"], summary["held_out"], summary["buckets"]) == (24, 4, {"16x16": 24})


def test_finished_stages_are_skipped(finished):
    settings, folder = finished
    files = [*folder.rglob("*.safetensors"), *settings.run.rglob("log.jsonl")]
    contents = [file.read_bytes() for file in files]
    assert train(settings) == folder
    assert [file.read_bytes() for file in files] == contents


def test_half_precision_model(finished, tmp_path):
    settings, _ = finished
    export(settings.model_copy(update={"model_dtype": "float16"}), tmp_path / "half")
    for part, stem in (
        ("unet", "diffusion_pytorch_model"),
        ("vae", "diffusion_pytorch_model"),
        ("text_encoder", "model"),
    ):
        assert {tensor.dtype for tensor in load_file(tmp_path / "half" / part / f"{stem}.safetensors").values()} == {
            torch.float16
        }


@pytest.mark.slow
@pytest.mark.parametrize("trial", range(2))
def test_killed_at_a_random_step_and_resumed_equals_unbroken(tmp_path, trial):
    """SIGKILL: no handler runs, files may be half written. Both stages, bit for bit, moments and averages included."""
    prepared(tmp_path)
    stage = {"max_steps": 40, "checkpoint_every": 5, "log_every": 1}
    whole, parts = (
        values(tmp_path, run=str(tmp_path / name), vae=stage, diffusion=stage) for name in ("whole", "parts")
    )
    subprocess.run(**command(tmp_path, whole), check=True, capture_output=True)
    killed = 0
    for name in ("vae", "diffusion"):
        process = subprocess.Popen(**command(tmp_path, parts), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        log, target = tmp_path / "parts" / name / "log.jsonl", 7 + 16 * trial
        while process.poll() is None and not (log.exists() and log.read_text().count("\n") >= target):
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
    assert killed == 2
    subprocess.run(**command(tmp_path, parts), check=True, capture_output=True)
    for name in ("vae", "diffusion"):
        assert_same(state_of(tmp_path / "parts" / name), state_of(tmp_path / "whole" / name))
        assert losses(tmp_path / "parts" / name) == losses(tmp_path / "whole" / name)


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    """Half the batch each, gradients averaged: the same up to the order of sums."""
    prepared(tmp_path)
    stage = {"max_steps": 5, "batch_size": 8}
    one, two = (values(tmp_path, run=str(tmp_path / name), vae=stage, diffusion=stage) for name in ("one", "two"))
    subprocess.run(**command(tmp_path, one), check=True, capture_output=True)
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m")
    done = subprocess.run(**command(tmp_path, two, launcher=torchrun), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    for name in ("vae", "diffusion"):
        (_, first), (_, second) = state_of(tmp_path / "one" / name), state_of(tmp_path / "two" / name)
        for key in first:
            if not key.endswith(("exp_avg", "exp_avg_sq")):
                torch.testing.assert_close(
                    second[key], first[key], rtol=1e-3, atol=1e-4, msg=lambda m, k=key: f"{k}: {m}"
                )
        assert losses(tmp_path / "two" / name) == pytest.approx(losses(tmp_path / "one" / name), rel=1e-3)


def test_resumed_stages_equal_unbroken_ones(tmp_path):
    """As above without processes, so that it runs every time: stopped by a changed `max_steps`."""
    prepared(tmp_path)
    constant = {"decay": "constant", "max_steps": 6}
    for stops in ("whole",), ("parts", 4), ("parts",):
        run, *stop = stops
        settings = config(
            tmp_path, run=str(tmp_path / run), vae=constant, diffusion={**constant, "max_steps": (*stop, 6)[0]}
        )
        train(settings)
    for name in ("vae", "diffusion"):
        assert_same(state_of(tmp_path / "parts" / name), state_of(tmp_path / "whole" / name))


def test_another_seed_trains_another_model(tmp_path):
    prepared(tmp_path)
    for seed in (0, 1):
        train(config(tmp_path, run=str(tmp_path / str(seed)), seed=seed, vae={"max_steps": 1}), ["vae"])
    (_, first), (_, second) = (state_of(tmp_path / str(seed) / "vae") for seed in (0, 1))
    assert not torch.equal(first["vae.encoder.conv_in.weight"], second["vae.encoder.conv_in.weight"])


def test_one_stage_at_a_time(tmp_path):
    prepared(tmp_path)
    settings = config(tmp_path)
    with pytest.raises(CheckpointError, match="expected a trained VAE in .* run the stage vae first"):
        train(settings, ["diffusion"])
    with pytest.raises(UsageError, match="unknown stage 'unet'; expected vae, decoder, text, diffusion"):
        train(settings, ["unet"])
    assert train(settings, ["vae"]) is None
    with pytest.raises(CheckpointError, match="has no checkpoint yet"):
        export(settings, tmp_path / "model")
    assert train(settings, ["diffusion"]) == settings.run / "model"


def no_data(tmp):
    pass


def broken_image(tmp):
    captioned_folder(tmp / "train", 3)
    (tmp / "train" / "1.png").write_bytes(b"")


def broken_held_out_image(tmp):
    captioned_folder(tmp / "train", 3)
    captioned_folder(tmp / "held-out", 3)
    (tmp / "held-out" / "2.png").write_bytes(b"GIF89a")


def unwritable_run(tmp):
    captioned_folder(tmp / "train", 3)
    captioned_folder(tmp / "held-out", 3)
    (tmp / "run").write_text("a file")


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (no_data, "expected captioned images at .*train, found no such folder"),
        (broken_image, r"1 images cannot be used, the first is 1\.png: the file is empty"),
        (broken_held_out_image, r"1 images cannot be used, the first is 2\.png"),
        (unwritable_run, "cannot write"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_1(tmp_path, prepare, message, capfd):
    prepare(tmp_path)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values(tmp_path)))
    assert run_command(["train", str(tmp_path / "config.yaml")]) == 1
    said = capfd.readouterr()
    (line,) = [line for line in said.err.splitlines() if line.startswith("error: ")]
    assert re.search(message, line)
    assert "Traceback" not in said.out + said.err


def test_data_error_names_the_folder(tmp_path):
    with pytest.raises(DataError, match="train"):
        train(config(tmp_path), ["vae"])
