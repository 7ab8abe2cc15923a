from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from latentdiff.diffusion.latents import start_noise
from latentdiff.image import open_image
from latentdiff.recipe import read_recipe
from tests import peers
from tests.cli.conftest import files

ROOT = Path(__file__).parents[2]


@pytest.fixture
def generate(command, sd1):
    """`latentdiff generate` with the tiny model and few steps."""
    return lambda *arguments: command("generate", "--model", sd1, "--steps", 2, *arguments)


def pixels(path) -> np.ndarray:
    return np.asarray(open_image(path)).astype(int)


# --- Files and names ------------------------------------------------------------------------------


def test_one_image(generate, workplace):
    done = generate("a photo of the cat", "--seed", 7)
    assert (done.code, done.out, done.err) == (0, "images/a-photo-of-the-cat-7.png\n", "")
    assert files(workplace) == ["images/a-photo-of-the-cat-7.png"]
    assert open_image("images/a-photo-of-the-cat-7.png").size == (64, 64)


def test_same_as_in_python(generate):
    generate("red fox", "--negative", "cat", "--guidance", 3, "--sampler", "euler", "--seed", 5, "--out", "a.png")
    (image,) = peers.ours("sd1")(
        "red fox", negative_prompt="cat", guidance_scale=3.0, sampler="euler", seed=5, steps=2, progress=False
    )
    assert np.array_equal(pixels("a.png"), np.asarray(image))
    again = read_recipe(open_image("a.png").info)
    assert again == read_recipe(image.info)


def test_without_guidance_the_models_own_is_taken(command, sd1, workplace):
    turbo = shutil.copytree(sd1, workplace / "sd_turbo")  # whose models are called in one step, unguided
    command("generate", "--model", turbo, "cat", "--seed", 0, "--out", "a.png")
    recipe = read_recipe(open_image("a.png").info)
    assert (recipe.steps, recipe.guidance_scale) == (1, 1.0)


def test_all_settings_arrive(generate):
    done = generate(
        "cat", "--seed", 0, "--guidance", 2, "--guidance-rescale", 0.5, "--guidance-interval", 0.5, 3, "--eta", 0.25,
        "--spacing", "linspace", "--width", 72, "--height", 40, "--attention", "plain", "--batch-size", 1,
        "--precision", "bf16", "--device", "cpu", "--out", "a.png",
    )  # fmt: skip
    assert done.code == 0
    recipe = read_recipe(open_image("a.png").info)
    assert (recipe.seed, recipe.guidance_scale, recipe.guidance_rescale, recipe.guidance_interval) == (
        0,
        2.0,
        0.5,
        (0.5, 3.0),
    )
    assert (recipe.eta, recipe.spacing, recipe.width, recipe.height, recipe.precision) == (
        0.25,
        "linspace",
        72,
        40,
        "bf16",
    )


def test_prediction_type_changes_the_image(generate):
    for name, options in {"a": (), "b": ("--prediction-type", "sample")}.items():
        assert generate("cat", "--seed", 0, *options, "--out", f"{name}.png").code == 0
    assert not np.array_equal(pixels("a.png"), pixels("b.png"))
    assert generate("cat", "--seed", 0, "--out", "b.png").code == 2  # which holds another image


def test_images_of_several_prompts(generate, workplace):
    done = generate("cat", "red fox", "-n", 2, "--seed", 5, "--out", "x/y")
    assert done.out.split() == ["x/y/cat-5.png", "x/y/cat-6.png", "x/y/red-fox-5.png", "x/y/red-fox-6.png"]
    assert files(workplace / "x/y") == sorted(Path(line).name for line in done.out.split())


@pytest.mark.parametrize(
    ("prompt", "name"),
    [("", "image-0"), ("!?", "image-0"), ("../../etc/passwd", "etc-passwd-0"), ("Eine Füchsin, 狐!", "eine-füchsin-狐-0"),
     ("狐" * 300, "狐" * 33 + "-0"), ("a" * 300, "a" * 100 + "-0")],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore::latentdiff.prompts.notice.PromptWarning")
def test_names_are_safe(generate, workplace, prompt, name):
    assert generate(prompt, "--seed", 0, "--steps", 1).code == 0
    assert files(workplace) == [f"images/{name}.png"]


def test_drawn_seed_is_printed(generate):
    done = generate("cat")
    (line,) = done.err.splitlines()
    seed = int(line.removeprefix("seed: "))
    assert done.out == f"images/cat-{seed}.png\n"
    assert read_recipe(open_image(done.out.strip()).info).seed == seed


def test_another_image_is_never_overwritten(generate, workplace):
    generate("cat", "--seed", 1)
    before = pixels("images/cat-1.png")
    assert generate("cat", "--seed", 1, "--guidance", 2).out == "images/cat-1-2.png\n"
    assert generate("cat", "--seed", 1, "--guidance", 3).out == "images/cat-1-3.png\n"
    assert generate("cat", "--seed", 1).out == "images/cat-1.png\n"  # the same image
    assert np.array_equal(pixels("images/cat-1.png"), before)
    (workplace / "images/dog-1.png").write_text("not an image")
    assert generate("dog", "--seed", 1).out == "images/dog-1-2.png\n"
    assert (workplace / "images/dog-1.png").read_text() == "not an image"


def test_named_file_is_not_overwritten_by_another_image(generate):
    generate("cat", "--seed", 1, "--out", "a.png")
    before = pixels("a.png")
    done = generate("dog", "--seed", 1, "--out", "a.png")
    assert done.code == 2 and "a.png holds another image" in done.err
    assert np.array_equal(pixels("a.png"), before)
    assert generate("cat", "--seed", 1, "--out", "a.png").code == 0


def test_skip_existing(generate, workplace):
    generate("cat", "dog", "--seed", 1)
    (workplace / "images/dog-1.png").unlink()
    kept = (workplace / "images/cat-1.png").stat().st_mtime_ns
    done = generate("cat", "dog", "-n", 2, "--seed", 1, "--skip-existing")
    assert done.out.split() == ["images/cat-2.png", "images/dog-1.png", "images/dog-2.png"]
    assert done.err == "images/cat-1.png is there already\n"
    assert (workplace / "images/cat-1.png").stat().st_mtime_ns == kept
    # The image that was made in a later call, alone, is the one that a whole batch would have held.
    alone = pixels("images/cat-2.png")
    generate("cat", "-n", 2, "--seed", 1, "--out", "batch")
    assert np.abs(pixels("batch/cat-2.png") - alone).max() <= 1


def test_skip_existing_makes_what_has_other_settings(generate):
    generate("cat", "--seed", 1)
    assert generate("cat", "--seed", 1, "--sampler", "ddpm", "--skip-existing").out == "images/cat-1-2.png\n"
    assert generate("cat", "--seed", 1, "--sampler", "ddpm", "--skip-existing").out == ""


def test_no_metadata(generate):
    generate("secret cat", "--seed", 1, "--no-metadata", "--out", "a.png")
    assert open_image("a.png").info == {}
    assert b"secret" not in Path("a.png").read_bytes()


def test_sheet(generate):
    done = generate("cat", "dog", "-n", 3, "--seed", 1, "--sheet", "sheet.png")
    assert done.out.splitlines()[-1] == "sheet.png"
    sheet = open_image("sheet.png")
    assert sheet.size == (4 * (64 + 12), 2 * (64 + 60))
    assert np.array_equal(np.asarray(sheet)[6:70, 6:70], pixels("images/cat-1.png"))


# --- Prompt files ---------------------------------------------------------------------------------


def test_prompts_from_a_file(generate, workplace):
    (workplace / "prompts.txt").write_text("cat\n\n# a comment\n  red fox  \n", encoding="utf-8")
    done = generate("dog", "--prompts", "prompts.txt", "--seed", 3)
    assert done.out.split() == ["images/dog-3.png", "images/cat-3.png", "images/red-fox-3.png"]


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "found none"), (b"# only\n", "found none"), (b"caf\xe9\n", "UTF-8 text in prompts.txt")],
)
def test_bad_prompt_file(generate, workplace, content, message):
    (workplace / "prompts.txt").write_bytes(content)
    done = generate("--prompts", "prompts.txt")
    assert done.code == 2 and message in done.err and len(done.errors) == 1


def test_one_failing_prompt_does_not_end_the_job(generate, monkeypatch):
    from latentdiff.pipeline import Pipeline

    whole = Pipeline.__call__

    def call(self, prompt, **settings):
        if prompt == "dog":
            raise RuntimeError("something\n  odd")
        return whole(self, prompt, **settings)

    monkeypatch.setattr(Pipeline, "__call__", call)
    done = generate("cat", "dog", "fox", "--seed", 1)
    assert done.code == 1
    assert done.out.split() == ["images/cat-1.png", "images/fox-1.png"]
    assert done.errors == ["error: 'dog': something odd", "error: 1 of 3 prompts failed"]


def test_wrong_settings_end_the_job_at_once(generate, workplace):
    done = generate("cat", "dog", "--steps", 0)
    assert done.code == 2 and len(done.errors) == 1
    assert files(workplace) == []


# --- Warnings and errors --------------------------------------------------------------------------


def test_long_prompt_says_what_is_dropped(generate):
    prompt = " ".join(["cat"] * 75 + ["red", "fox"])
    done = generate(prompt, "--seed", 1, "--steps", 1, "--prompt-syntax", "plain")
    assert done.code == 0
    assert done.err == "warning: the prompt has more than the 75 tokens that the model reads; dropped: 'red fox'\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["cat", "--sampler", "plms"], "'plms' is not one of 'ddim', 'ddpm', 'euler', 'dpmpp-2m'"),
        (["cat", "--width", 100], "width that is a positive multiple of 8, found 100"),
        (["cat", "--height", -8], "--height to be a whole number of 1 or more, found -8"),
        (["cat", "--steps", 0], "--steps to be a whole number of 1 or more, found 0"),
        (["cat", "--steps", "many"], "'many' is not a valid integer"),
        (["cat", "--eta", 2], "--eta to be a finite number of 0 to 1"),
        (["cat", "--guidance", "nan"], "finite number"),
        (["cat", "-n", 0], "-n to be a whole number of 1 to 10000, found 0"),
        (["cat", "--seed", -1], "--seed to be a whole number of 0 to 2**64 - 1, found -1"),
        (["cat", "--device", "tpu"], "expected the device auto, cpu, cuda"),
        (["cat", "--frobnicate"], "No such option"),
        (["cat", "--out", "a.png", "--sheet", "a.png"], "--out and --sheet both name a.png"),
        (["cat", "--sheet", "a.png", "--preview", "a.png"], "--sheet and --preview both name a.png"),
        ([], "expected a prompt"),
        (["--prompts", "none.txt"], "none.txt"),
        (["cat", "dog", "--out", "a.png"], "expected a folder for 2 images, found --out a.png"),
        (["\udcff"], "valid Unicode"),
    ],
)
def test_wrong_usage(generate, workplace, arguments, message):
    done = generate(*arguments)
    assert done.code == 2
    assert len(done.errors) == 1 and message in done.errors[0]
    assert done.out == "" and "Traceback" not in done.err
    assert files(workplace) == []


def test_inpainting_model(command):
    done = command("generate", "--model", peers.folder("inpaint"), "cat")
    assert done.code == 2 and "this model is for inpainting" in done.errors[0]


@pytest.mark.parametrize(
    "content", [b"", b"<html>", b"version https://git-lfs.github.com/spec/v1\n", b"\x80\x02garbage"]
)
@pytest.mark.parametrize("name", ["model.safetensors", "model.ckpt"])
def test_foreign_checkpoint(command, workplace, name, content):
    (workplace / name).write_bytes(content)
    done = command("generate", "--model", name, "cat")
    assert done.code == 1 and len(done.errors) == 1 and name in done.errors[0]
    assert files(workplace) == [name]


def test_no_such_model(command):
    done = command("generate", "--model", "nothing-here", "cat")
    assert done.code == 1 and len(done.errors) == 1


def test_output_is_checked_before_anything_is_computed(command, workplace, monkeypatch):
    monkeypatch.setattr("latentdiff.pipeline.Pipeline.load", lambda *_, **__: pytest.fail("the model was loaded"))
    (workplace / "file").write_text("x")
    for out, message in (
        ("file/images", "file is not a folder"),
        ("/proc/nothing/here", "/proc"),
        ("folder.png", "it is a folder"),
    ):
        (workplace / "folder.png").mkdir(exist_ok=True)
        done = command("generate", "cat", "--out", out)
        assert done.code == 2 and message in done.errors[0]
    assert files(workplace) == ["file"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_folder_without_permission(command, workplace):
    (workplace / "closed").mkdir(mode=0o500)
    done = command("generate", "cat", "--out", "closed")
    assert done.code == 2 and "Permission denied" in done.errors[0]


def test_full_disk(generate, workplace, monkeypatch):
    def save(self, file, **options):
        Path(file).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", save)
    done = generate("cat", "--seed", 1)
    assert done.code == 1 and "No space left on device" in done.errors[0]
    assert files(workplace) == []


def test_ctrl_c(generate, workplace, monkeypatch):
    def call(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("latentdiff.pipeline.Pipeline.__call__", call)
    done = generate("cat", "dog", "--seed", 1)
    assert (done.code, done.errors, done.err.splitlines()[-1]) == (130, [], "interrupted")
    assert files(workplace) == []


# --- As its own program ---------------------------------------------------------------------------


def program(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "latentdiff", *map(str, arguments)]


def test_as_a_program(workplace, sd1):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        program("generate", "--model", sd1, "cat", "--steps", 1, "--seed", 1),
        capture_output=True,
        text=True,
        env=environment,
    )
    assert (done.returncode, done.stdout) == (0, "images/cat-1.png\n"), done.stderr
    assert "Traceback" not in done.stderr
    recipe = json.loads(open_image("images/cat-1.png").info["latentdiff"])
    assert recipe["prompt"] == "cat"
    assert start_noise([recipe["seed"]], (4, 8, 8)).shape == (1, 4, 8, 8)


def test_reader_that_leaves_is_no_error(workplace, sd1):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(program("inspect", sd1), stdout=writing, stderr=subprocess.PIPE, text=True, env=environment)
    os.close(writing)
    assert done.returncode == 0 and done.stderr == ""


def test_ctrl_c_as_a_signal(workplace, sd1):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        program("generate", "--model", sd1, "cat", "--steps", 1000, "-n", 50, "--batch-size", 1),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
    ) as running:  # fmt: skip
        assert running.stderr.readline().startswith("seed: ")  # it is at work now
        running.send_signal(signal.SIGINT)
        out, err = running.communicate(timeout=600)
    assert (running.returncode, out, err.strip().splitlines()[-1]) == (130, "", "interrupted")
    assert files(workplace) == []
