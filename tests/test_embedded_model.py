"""The embedded model as people use it: it draws, says what it is, and gives the same image in diffusers."""

from __future__ import annotations

import logging
from random import Random

import numpy as np
import pytest

from latentdiff import Pipeline
from latentdiff.checkpoints.embedded import embedded_model
from latentdiff.diffusion.latents import start_noise
from latentdiff.prompts.words import read_words
from latentdiff.recipe import read_recipe
from tests.scenes import make_scenes, scene_language

PROMPT = "two cats and a rocket on a blue background"


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return Pipeline.load(device="cpu", precision="fp32")


def test_same_image_in_diffusers_without_options_or_complaints(
    pipe: Pipeline,
    caplog: pytest.LogCaptureFixture,
    recwarn: pytest.WarningsRecorder,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from diffusers import DiffusionPipeline, StableDiffusionPipeline

    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)  # to caplog
    peer = DiffusionPipeline.from_pretrained(embedded_model(), local_files_only=True)
    assert type(peer) is StableDiffusionPipeline, "eight channels in are its latents', not an image beside them"
    said = [str(warning.message) for warning in recwarn] + [record.getMessage() for record in caplog.records]
    assert not [line for line in said if any(word in line for word in ("steps_offset", "dtype", "guidance", "ignored"))]
    peer.set_progress_bar_config(disable=True)
    latents = start_noise([7], (peer.unet.config.in_channels, *[peer.unet.config.sample_size] * 2))
    expected = peer(PROMPT, latents=latents, num_inference_steps=25, guidance_scale=5.0, output_type="np").images[0]
    image = pipe(PROMPT, latents=latents, steps=25, guidance_scale=5.0, seed=7, progress=False)[0]
    difference = np.abs(np.asarray(image, dtype=np.float64) - expected * 255.0)
    assert difference.max() <= 1.5  # one grey level, and the rounding of ours


def test_background_follows_the_prompt(pipe: Pipeline) -> None:
    """Of all backgrounds and several seeds, nine in ten: at the upper edge, where things seldom are."""
    colours = list(scene_language.BACKGROUNDS)
    asked = [colour for colour in colours for _ in range(2)]
    prompts = [f"a photo of a small cat on {'an' if colour[0] == 'o' else 'a'} {colour} background" for colour in asked]
    right = 0
    for image, colour in zip(pipe(prompts, seed=3, steps=8, progress=False), asked, strict=True):
        edge = np.median(np.asarray(image, dtype=np.float64)[:4].reshape(-1, 3), axis=0)
        near = min(colours, key=lambda name: np.linalg.norm(edge - scene_language.BACKGROUNDS[name]))
        right += near == colour
    assert right >= 0.9 * len(asked), right


def test_image_names_the_model(pipe: Pipeline) -> None:
    image = pipe(PROMPT, seed=1, steps=2, progress=False)[0]
    recipe = read_recipe(image.info)
    side = pipe.unet.config.sample_size * pipe.vae.config.downscale
    assert (recipe.model, recipe.width, recipe.height) == ("latentdiff-embedded", side, side)
    assert side == read_words(embedded_model()).size == image.width == image.height
    assert recipe.model_hash == pipe.model_hash != ""


def test_it_says_that_it_knows_the_world_of_its_scenes() -> None:
    known = read_words(embedded_model())
    language = scene_language
    assert known.kinds["things"] == tuple(sorted(language.NOUNS))
    assert known.kinds["colours"] == tuple(sorted(language.OBJECT_COLOURS))
    assert known.kinds["backgrounds"] == tuple(sorted((*language.BACKGROUNDS, *language.PLACES)))
    assert (known.kinds["sizes"], known.size) == (("small", "big"), make_scenes.SIZE)
    assert known.kinds["relations"] == tuple(sorted(language.RELATIONS))
    rng = Random(0)
    prompts = [language.caption(language.draw_plan(rng, split), rng) for split in ("train", "test") for _ in range(500)]
    assert list(known.remarks(prompts)) == []


def test_nouns_and_their_plurals_are_few_tokens(pipe: Pipeline) -> None:
    """A thing that is spelt in pieces is learned from fewer examples."""
    words = {word for noun in scene_language.NOUNS for word in (*noun.split(), *scene_language.plural_of(noun).split())}
    counts = [len(pipe.tokenizer(word)["input_ids"]) - 2 for word in words]
    assert sum(count == 1 for count in counts) >= 0.8 * len(words) and max(counts) <= 4
