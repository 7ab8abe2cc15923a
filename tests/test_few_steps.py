"""A model with a LoRA of its own for few steps: `fast` draws with it, and nothing else does."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from latentdiff import Pipeline
from latentdiff.adapters.lora.adapter import LoRA
from latentdiff.adapters.lora.saving import save_lora
from latentdiff.adapters.lora.spec import LoRASpec
from latentdiff.checkpoints.conversion import convert
from latentdiff.checkpoints.distilled import Distilled, copy_distilled
from latentdiff.cli import run
from latentdiff.errors import CheckpointError
from latentdiff.image import open_image, save_image
from latentdiff.networks.kernels import has_taps
from latentdiff.recipe import read_recipe
from latentdiff.tasks import image_to_image, interpolate
from tests import peers
from tests.adapters.lora.conftest import fill

PROMPT = "a photo of the cat"
LCM = {"sampler": "lcm", "spacing": "lcm", "steps": 4, "guidance_scale": 1.0}
DDIM = {"sampler": "ddim", "spacing": "trailing", "steps": 5, "guidance_scale": 1.0}
ONE = {"seed": 7, "progress": False}


def with_lora(model: Path, options: dict, scratch: Path) -> Path:
    """A model's folder with a random LoRA of all layers of its U-Net that the stage trains."""
    unet = peers.ours("sd1").unet
    targets = ("attention", "feed_forward", "projections", "convolutions")
    save_lora(fill(LoRA.create(unet, None, LoRASpec(4, targets=targets)), 1), scratch / "a.safetensors", dialect="peft")
    copy_distilled(Distilled(scratch / "a.safetensors", options), model)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    tmp = tmp_path_factory.mktemp("few-steps")
    shutil.copytree(peers.folder("sd1"), tmp / "model", copy_function=os.link)
    return with_lora(tmp / "model", LCM, tmp)


@pytest.fixture(scope="module")
def pipe(folder) -> Pipeline:
    return load(folder)


def load(folder: Path, **options) -> Pipeline:
    return Pipeline.load(folder, device="cpu", precision="fp32", **options)


def pixels(image) -> np.ndarray:
    return np.asarray(image).astype(int)


def drawn(pipe: Pipeline, **options) -> np.ndarray:
    return pixels(pipe(PROMPT, **{**ONE, **options})[0])


def apart(first: np.ndarray, second: np.ndarray) -> int:
    return int(np.abs(first - second).max())


@pytest.mark.parametrize(("name", "options"), [("LCMScheduler", LCM), ("DDIMScheduler", DDIM)])
def test_the_image_is_that_of_diffusers(name, options, tmp_path):
    import diffusers

    shutil.copytree(peers.folder("sd1"), tmp_path / "model", copy_function=os.link)
    folder = with_lora(tmp_path / "model", options, tmp_path)
    peer = diffusers.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    spacing = {"timestep_spacing": "trailing"} if name == "DDIMScheduler" else {}
    peer.scheduler = getattr(diffusers, name).from_config(peer.scheduler.config, **spacing)
    peer.set_progress_bar_config(disable=True)
    call = {"num_inference_steps": options["steps"], "guidance_scale": 1.0, "output_type": "np"}
    plain = peer(PROMPT, generator=seeded(7), **call).images[0]
    peer.load_lora_weights(folder, subfolder="fast")
    expected = (peer(PROMPT, generator=seeded(7), **call).images[0] * 255).round().astype(int)
    found = drawn(load(folder), fast=True)
    assert apart(found, expected) <= 1
    assert apart(found, (plain * 255).round().astype(int)) > 5, "the LoRA acts"


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_it_is_the_lora_at_full_strength_and_leaves_no_trace(pipe, folder):
    plain, fast = drawn(pipe), drawn(pipe, fast=True)
    assert not has_taps(pipe.unet)
    assert np.array_equal(drawn(pipe), plain) and np.array_equal(drawn(pipe, fast=True), fast)
    pipe.load_lora(folder / "fast")
    by_hand = drawn(pipe, **LCM)
    pipe.unload_lora()
    assert np.array_equal(by_hand, fast) and apart(plain, fast) > 5


def test_what_is_given_wins(pipe):
    options = {"steps": 2, "sampler": "euler", "spacing": "karras", "guidance_scale": 2.0}
    recipe = read_recipe(pipe(PROMPT, fast=True, **options, **ONE)[0].info)
    assert {name: getattr(recipe, name) for name in options} == options and recipe.fast
    (image,) = pipe(PROMPT, fast=True, steps=8, **ONE)
    recipe = read_recipe(image.info)
    assert {name: getattr(recipe, name) for name in LCM} == {**LCM, "steps": 8}


def test_a_negative_prompt_without_guidance_is_told(pipe):
    with pytest.warns(UserWarning, match="the negative prompt does nothing; give guidance_scale 1.5"):
        pipe(PROMPT, negative_prompt="dog", fast=True, steps=1, **ONE)


def test_tasks_draw_with_it_too(pipe, folder):
    (source,) = pipe(PROMPT, **ONE, steps=2)
    (edited,) = image_to_image(pipe, source, "a dog", strength=0.5, fast=True, **ONE)
    frames = interpolate(pipe, ["a cat", "a dog"], frames=2, fast=True, **ONE)
    for image, other in ((edited, image_to_image(pipe, source, "a dog", strength=0.5, **LCM, **ONE)[0]),
                         (frames[0], interpolate(pipe, ["a cat", "a dog"], frames=2, **LCM, **ONE)[0])):  # fmt: skip
        recipe = read_recipe(image.info)
        assert recipe.fast and {name: getattr(recipe, name) for name in LCM} == LCM
        assert apart(pixels(image), pixels(other)) > 2, "the LoRA acts"


def test_threads_do_not_disturb_one_another(pipe):
    kinds = [{}, {"fast": True}, {"steps": 3}, {"fast": True, "steps": 2}] * 3
    alone = [drawn(pipe, **kind) for kind in kinds]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda kind: drawn(pipe, **kind), kinds))
    assert all(map(np.array_equal, alone, together))


def test_little_memory_and_a_pickle_give_the_same_image(pipe, folder):
    fast = drawn(pipe, fast=True)
    assert apart(drawn(load(folder, low_memory=True), fast=True), fast) <= 1
    assert np.array_equal(drawn(pickle.loads(pickle.dumps(pipe)), fast=True), fast)


def test_reproduce_makes_it_again_and_names_a_model_without(folder, pipe, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    (image,) = pipe(PROMPT, fast=True, **ONE)
    save_image(image, tmp_path / "fast.png")
    recipe = read_recipe(open_image(tmp_path / "fast.png").info)
    assert recipe.fast and [entry["part"] for entry in recipe.loras] == ["fast"]
    model = ("--device", "cpu", "--model")
    assert run(["reproduce", "fast.png", *model, str(folder)]) == 0
    assert "identical: every pixel is the same" in capfd.readouterr().out
    assert run(["reproduce", "fast.png", *model, str(peers.folder("sd1"))]) != 0
    assert "was made with the model's LoRA for few steps" in capfd.readouterr().err
    assert run(["import", "fast.png"]) == 0
    said = capfd.readouterr().out
    assert "--fast" in said and "--lora" not in said


def test_an_image_that_is_there_is_found_again(folder, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    command = ["generate", PROMPT, "--seed", "7", "--model", str(folder), "--out", "images", "--skip-existing"]
    assert run([*command, "--fast"]) == run([*command, "--fast"]) == 0
    assert "is there already" in capfd.readouterr().err
    assert run([*command, "--steps", "4"]) == 0
    assert "is there already" not in capfd.readouterr().err


def test_saving_keeps_it_and_a_single_file_says_that_it_cannot(pipe, folder, tmp_path):
    pipe.save(tmp_path / "saved")
    first, second = (
        load_file(model / "fast" / "pytorch_lora_weights.safetensors") for model in (folder, tmp_path / "saved")
    )
    assert first.keys() == second.keys()
    again = load(tmp_path / "saved")
    assert np.array_equal(drawn(again, fast=True), drawn(pipe, fast=True)) and "fast in 4 steps" in repr(again)
    assert any(
        "fast/ left out, as a single file has no place" in note for note in convert(folder, tmp_path / "a.safetensors")
    )


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (None, "found no sampling.json"),
        ("{}", "must say sampler, spacing, steps, guidance_scale, found nothing"),
        (json.dumps({**LCM, "sampler": "magic"}), "expected sampler to be one of"),
        (json.dumps({**LCM, "steps": None}), "must say"),
        (json.dumps({**LCM, "steps": 0}), "steps"),
    ],
)
def test_a_damaged_part_is_named(folder, tmp_path, text, reason):
    shutil.copytree(folder, tmp_path / "model")
    path = tmp_path / "model" / "fast" / "sampling.json"
    path.unlink() if text is None else path.write_text(text)
    with pytest.raises(CheckpointError, match=reason):
        load(tmp_path / "model")
