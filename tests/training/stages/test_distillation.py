"""Whole runs with the stage that distils the U-Net: it learns, resumes to the bit, and its LoRA goes with the model."""

import json
import shutil

import numpy as np
import pytest
import torch

from latentdiff.errors import CheckpointError, ConfigError
from latentdiff.image import open_image
from latentdiff.pipeline import Pipeline
from latentdiff.recipe import read_recipe
from latentdiff.training.checkpoint import load_checkpoint, newest_checkpoint
from latentdiff.training.stages.train import export, train
from tests.training.build import config, prepared, values

PROMPT = "a photo of the cat"


def settings_of(tmp, **changes):
    learning = {"batch_size": 8, "log_every": 20, "ema_decay": 0.9}
    stage = {**values(tmp)["diffusion"], **learning}
    distillation = {
        **stage, "max_steps": 60, "lr": 1e-2, "segments": 4, "teacher_steps": 20, "rank": 8, "validate_every": 30,
        "checkpoint_every": 30, "preview_every": 60, "sample_count": 2, **changes,
    }  # fmt: skip
    diffusion = {**learning, "max_steps": 120, "lr": 3e-3, "min_snr_gamma": None}
    return config(tmp, vae={"max_steps": 2}, diffusion=diffusion, distillation=distillation)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    tmp = prepared(tmp_path_factory.mktemp("distilled"), images=24)
    settings = settings_of(tmp)
    return tmp, settings, train(settings)


def state_of(stage):
    checkpoint = load_checkpoint(newest_checkpoint(stage / "checkpoints")[0])
    return {**checkpoint.weights, **{f"ema {n}": t for n, t in checkpoint.ema.items()}, **checkpoint.optimizer}


def distances(settings):
    entries = map(json.loads, (settings.run / "distillation" / "log.jsonl").read_text().splitlines())
    return {entry["step"]: entry["distance"] for entry in entries if "distance" in entry}


def test_the_student_comes_nearer_to_its_teacher(finished):
    found = distances(finished[1])
    assert list(found) == [0, 30, 60] and found[60] < found[30] < found[0]
    assert found[60] < 0.9 * found[0], found


def test_the_distance_is_that_of_the_pipelines_images(finished):
    """Of latents of `fast` and of the guided walk of the teacher, both by the public pipeline."""
    _, settings, folder = finished
    pipe = Pipeline.load(folder, device="cpu")
    options = {"seed": 1, "output": "latents", "num_images": 4, "progress": False}
    teacher = pipe(PROMPT, steps=20, guidance_scale=5.0, sampler="ddim", spacing="trailing", **options)
    fast = pipe(PROMPT, fast=True, **options)
    without = pipe(PROMPT, steps=4, guidance_scale=1.0, sampler="ddim", spacing="trailing", **options)
    far, near = ((one - teacher).square().mean().sqrt() / teacher.std() for one in (without, fast))
    assert near < far


def test_a_run_that_was_cut_off_goes_on_to_the_same_bits(finished):
    tmp, settings, _ = finished
    stage = settings.run / "distillation"
    before = state_of(stage)
    shutil.rmtree(stage / "final")
    shutil.rmtree(stage / "checkpoints" / "step-00000060")
    train(settings)
    after = state_of(stage)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_samples_are_drawn_as_fast_draws(finished):
    _, settings, folder = finished
    drawn = open_image(settings.run / "distillation" / "samples" / "step-00000060" / "ema" / "00.png")
    recipe = read_recipe(drawn.info)
    assert (recipe.steps, recipe.sampler, recipe.guidance_scale) == (4, "ddim", 1.0)
    (again,) = Pipeline.load(folder, device="cpu")(recipe.prompt, seed=recipe.seed, fast=True, progress=False)
    assert np.abs(np.asarray(again, int) - np.asarray(drawn, int)).max() <= 3  # the LoRA is in float16


def test_another_teacher_is_refused(finished, tmp_path):
    _, settings, _ = finished
    note = settings.run / "distillation" / "teacher"
    own = note.read_text()
    note.write_text("0123456789abcdef\n")
    try:
        with pytest.raises(CheckpointError, match="distils another U-Net than that of this run; delete it"):
            export(settings, tmp_path / "model")
    finally:
        note.write_text(own)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"text_encoder_lr": 1e-4}, "text_encoder_lr is not for distillation"),
        ({"crop": "random"}, "distillation needs cache_latents and crop: center"),
        ({"huber_c": 0.0}, "huber_c"),
    ],
)
def test_settings_without_meaning_are_refused(tmp_path, changes, reason):
    with pytest.raises(ConfigError, match=reason):
        settings_of(tmp_path, **changes)
