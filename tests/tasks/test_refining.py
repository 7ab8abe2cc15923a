"""SDXL's refiner over the end of the schedule, against diffusers' two pipelines."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from diffusers import StableDiffusionXLImg2ImgPipeline, StableDiffusionXLPipeline

from latentdiff import Pipeline
from latentdiff.diffusion.latents import start_noise
from latentdiff.errors import UsageError
from latentdiff.tasks import refine
from tests import peers, tiny
from tests.cli.conftest import command, workplace  # noqa: F401 - fixtures

PROMPT = "a photo of the cat"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    place = tmp_path_factory.mktemp("refiner")
    return tiny.xl_folder(place), tiny.refiner_folder(place)


@pytest.fixture
def models(folders: tuple[Path, Path]) -> tuple[Pipeline, Pipeline]:
    base, refiner = (Pipeline.load(folder, precision="fp32") for folder in folders)
    return base, refiner


@pytest.mark.parametrize(("steps", "switch"), [(5, 0.8), (10, 0.5), (8, 0.3)])
def test_same_image_as_diffusers(folders, models, steps: int, switch: float) -> None:
    base = StableDiffusionXLPipeline.from_pretrained(folders[0])
    refiner = StableDiffusionXLImg2ImgPipeline.from_pretrained(folders[1])
    same = {"prompt": PROMPT, "negative_prompt": "dog", "num_inference_steps": steps, "guidance_scale": 5.0}
    size = {"height": 64, "width": 64}
    latents = base(
        **same, **size, denoising_end=switch, output_type="latent", latents=start_noise([3], (4, 8, 8))
    ).images
    expected = refiner(
        **same, image=latents, denoising_start=switch, aesthetic_score=7.0, negative_aesthetic_score=3.0, output_type="np",
        original_size=(64, 64), target_size=(64, 64),
    ).images[0]  # fmt: skip
    (image,) = refine(
        *models, PROMPT, negative_prompt="dog", steps=steps, switch=switch, seed=3, aesthetic_score=7.0,
        negative_aesthetic_score=3.0, progress=False,
    )  # fmt: skip
    assert np.asarray(image).std() > 10
    assert np.abs(np.asarray(image) - np.round(expected * 255)).max() <= 1


def test_the_refiner_and_its_score_count(models) -> None:
    plain = np.asarray(models[0](PROMPT, steps=5, seed=3, progress=False)[0]).astype(int)
    images = [
        np.asarray(
            refine(*models, PROMPT, steps=5, seed=3, progress=False, switch=0.3, aesthetic_score=score)[0]
        ).astype(int)
        for score in (1.0, 9.0)
    ]
    assert np.abs(images[0] - plain).max() > 5 and np.abs(images[0] - images[1]).max() > 1


def test_a_switch_without_steps_and_other_latents_are_refused(models) -> None:
    with pytest.raises(UsageError, match="leaves steps to both models"):
        refine(*models, PROMPT, steps=2, switch=0.01)
    with pytest.raises(UsageError, match="other latents"):
        refine(models[0], peers.ours("sd1"), PROMPT, steps=4)


def test_the_command_and_reproduce(command, workplace: Path, folders) -> None:  # noqa: F811
    base, refiner = folders
    made = command(
        "generate", "cat", "--model", base, "--refiner", refiner, "--steps", 5, "--seed", 1, "--out", "a.png",
        "--precision", "fp32",
    )  # fmt: skip
    assert made.code == 0, made.err
    again = command("reproduce", "a.png", "--model", base, "--source", f"refiner={refiner}")
    assert again.out.splitlines()[-1].startswith("identical"), again.err
    wrong = command("reproduce", "a.png", "--model", base, "--source", f"refiner={base}")
    assert wrong.code == 1 and "not the refiner" in wrong.errors[0]


@pytest.mark.parametrize("extra", [("--hires", "2x"), ("--seamless", "x")])
def test_what_the_refiner_does_not_go_with_is_named(command, workplace: Path, folders, extra) -> None:  # noqa: F811
    base, refiner = folders
    made = command("generate", "cat", "--model", base, "--refiner", refiner, "--seed", 1, *extra)
    assert made.code == 2 and f"--refiner does not go with {extra[0]}" in made.err
