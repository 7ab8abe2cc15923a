"""The embedded model as people use it: it draws, says what it is, and gives the same image in diffusers."""

from __future__ import annotations

import numpy as np
import pytest

from latentdiff import Pipeline
from latentdiff.checkpoints.embedded import embedded_model
from latentdiff.diffusion.latents import start_noise
from latentdiff.recipe import read_recipe

PROMPT = "two cats and a rocket on a blue background"


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return Pipeline.load(device="cpu", precision="fp32")


def test_same_image_in_diffusers_without_options_or_complaints(
    pipe: Pipeline, caplog: pytest.LogCaptureFixture, recwarn: pytest.WarningsRecorder
) -> None:
    from diffusers import StableDiffusionPipeline

    peer = StableDiffusionPipeline.from_pretrained(embedded_model(), local_files_only=True)
    said = [str(warning.message) for warning in recwarn] + [record.getMessage() for record in caplog.records]
    assert not [line for line in said if "steps_offset" in line or "dtype" in line]
    peer.set_progress_bar_config(disable=True)
    latents = start_noise([7], (8, 12, 12))
    expected = peer(PROMPT, latents=latents, num_inference_steps=25, guidance_scale=5.0, output_type="np").images[0]
    image = pipe(PROMPT, latents=latents, steps=25, guidance_scale=5.0, seed=7, progress=False)[0]
    difference = np.abs(np.asarray(image, dtype=np.float64) - expected * 255.0)
    assert difference.max() <= 1.5  # one grey level, and the rounding of ours


def test_background_follows_the_prompt(pipe: Pipeline) -> None:
    colours = {"red": (214, 40, 44), "green": (45, 160, 70), "blue": (45, 90, 220), "white": (255, 255, 255)}
    prompts = [f"a photo of a cat on a {name} background" for name in colours]
    for image, colour in zip(pipe(prompts, seed=3, progress=False), colours.values(), strict=True):
        middle = np.median(np.asarray(image).reshape(-1, 3), axis=0)
        assert np.abs(middle - colour).max() < 40


def test_image_names_the_model(pipe: Pipeline) -> None:
    image = pipe(PROMPT, seed=1, steps=2, progress=False)[0]
    recipe = read_recipe(image.info)
    assert (recipe.model, recipe.width, recipe.height) == ("latentdiff-embedded", 96, 96)
    assert recipe.model_hash == pipe.model_hash != ""


@pytest.mark.parametrize("word", ["foxes", "snowmen", "cherries", "cacti", "buses", "cats"])
def test_plurals_are_words_that_it_knows(pipe: Pipeline, word: str) -> None:
    _, *tokens, _ = pipe.tokenizer(f"two {word}")["input_ids"]
    assert len(tokens) == 2
