"""SDXL from prompt to image beside diffusers on small random weights: the same chain, another conditioning."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline

from latentdiff import Pipeline
from latentdiff.errors import UsageError
from latentdiff.networks.text_embedding import Reading
from latentdiff.recipe import read_recipe
from tests import tiny

PROMPT = "a photo of the cat"
SIDE = 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.xl_folder(tmp_path_factory.mktemp("xl"))


@pytest.fixture(scope="module")
def peer(folder: Path) -> StableDiffusionXLPipeline:
    pipe = StableDiffusionXLPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def pipe(folder: Path) -> Pipeline:
    return Pipeline.load(folder, precision="fp32")


def start(seed: int = 0, height: int = SIDE, width: int = SIDE) -> torch.Tensor:
    return torch.randn(1, 4, height // 8, width // 8, generator=torch.Generator().manual_seed(seed))


def difference(image, expected: np.ndarray) -> float:
    assert np.asarray(image).std() > 5, "an image of one colour proves nothing"
    return np.abs(np.asarray(image).astype(float) - np.round(expected * 255)).max()


def test_text_is_that_of_both_encoders(pipe: Pipeline, peer: StableDiffusionXLPipeline) -> None:
    for skip in (None, 1):
        tokens, _, pooled, _ = peer.encode_prompt(PROMPT, clip_skip=skip)
        found = pipe.encode([PROMPT], Reading(clip_skip=1 if skip is None else 2 + skip))
        assert found.shape == (1, 78, tokens.shape[2])
        assert (found[:, :-1] - tokens).abs().max() < 1e-5
        assert (found[:, -1, : tiny.POOLED_WIDTH] - pooled).abs().max() < 1e-5
        assert not found[:, -1, tiny.POOLED_WIDTH :].any()


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({}, {}),
        ({"negative_prompt": "dog red"}, {"negative_prompt": "dog red"}),
        ({"guidance_scale": 1.0}, {"guidance_scale": 1.0}),
        ({"guidance_rescale": 0.7, "clip_skip": 3}, {"guidance_rescale": 0.7, "clip_skip": 1}),
        (
            {"original_size": (100, 90), "crop_top_left": (3, 4), "target_size": (64, 80)},
            {"original_size": (100, 90), "crops_coords_top_left": (3, 4), "target_size": (64, 80)},
        ),
        ({"height": 48, "width": 80}, {"height": 48, "width": 80}),
    ],
)
def test_images_are_those_of_diffusers(
    pipe: Pipeline, peer: StableDiffusionXLPipeline, ours: dict, theirs: dict
) -> None:
    size = {"height": SIDE, "width": SIDE}
    same = {"guidance_scale": 5.0, "latents": start(**{name: ours.get(name, SIDE) for name in size})}
    (expected,) = peer(PROMPT, num_inference_steps=4, output_type="np", **size | same | theirs).images
    (image,) = pipe(PROMPT, steps=4, **size | same | ours)
    assert difference(image, expected) <= 1


def test_zeros_stand_for_an_empty_negative_prompt_only_where_the_model_says_so(tmp_path: Path) -> None:
    plain = Pipeline.load(tiny.xl_folder(tmp_path, zeros=False), precision="fp32")
    assert plain.encode([""], negative=True).abs().max() > 0.1
    peer = StableDiffusionXLPipeline.from_pretrained(tmp_path / "xl")
    peer.set_progress_bar_config(disable=True)
    (expected,) = peer(PROMPT, num_inference_steps=3, latents=start(), height=SIDE, width=SIDE, output_type="np").images
    (image,) = plain(PROMPT, steps=3, latents=start())
    assert difference(image, expected) <= 1


def test_a_clip_skip_of_two_in_texts_of_web_uis_is_what_the_model_was_trained_on(pipe: Pipeline) -> None:
    text = f"{PROMPT}\nSteps: 2, Sampler: Euler, Schedule type: SGM Uniform, CFG scale: 5, Seed: 1, Size: 64x64, Clip skip: "
    read = {skip: read_recipe({"parameters": text + str(skip)}) for skip in (1, 2, 3)}
    plain, same, other = (pipe.encode([PROMPT], Reading("a1111", read[skip].clip_skip)) for skip in (1, 2, 3))
    assert torch.equal(plain, same) and not torch.allclose(plain, other, atol=1e-3)
    with pytest.raises(UsageError, match=r"a clip skip of 1 \(none\) to 3, the layers of the text encoder, found 4"):
        pipe.encode([PROMPT], Reading("a1111", 4))


def test_parts_of_prompts_are_embeddings_of_both_encoders(pipe: Pipeline, peer: StableDiffusionXLPipeline) -> None:
    """Stages and `AND`: each text as transformers' two encoders embed it, and its own pooled text."""
    known = {}
    for text in ("a red cat", "a blue cat", "a dog"):
        tokens, _, pooled, _ = peer.encode_prompt(text)
        known[text] = tokens, pooled
    first, second = pipe.prompt_encoder(Reading("a1111")).prompt("a [red:blue:0.5] cat AND a dog", 4).parts
    at = {step: first.at(step) for step in (1, 2, 3, 4)}
    for found, text in ((at[1], "a red cat"), (at[2], "a red cat"), (at[3], "a blue cat"), (at[4], "a blue cat"),
                        (second.at(1), "a dog")):  # fmt: skip
        tokens, pooled = known[text]
        assert (found[:, :-1] - tokens).abs().max() < 1e-5
        assert (found[:, -1, : tiny.POOLED_WIDTH] - pooled).abs().max() < 1e-5


def test_weights_of_comfy_lead_away_from_the_empty_prompt(pipe: Pipeline, peer: StableDiffusionXLPipeline) -> None:
    """Known values: empty + weight * (text - empty), for both encoders' states alike; pooled text is not weighted."""
    found = pipe.encode(["a (cat:1.5)"], Reading("comfy"))
    (tokens, _, pooled, _), (empty, *_) = (peer.encode_prompt(text) for text in ("a cat", ""))
    weights = torch.ones(1, 77, 1)
    weights[:, 2] = 1.5
    assert (found[:, :-1] - (empty + weights * (tokens - empty))).abs().max() < 1e-5
    assert (found[:, -1, : tiny.POOLED_WIDTH] - pooled).abs().max() < 1e-5


def test_an_image_does_not_depend_on_its_batch(pipe: Pipeline) -> None:
    prompts = [PROMPT, "dog (red:1.4) BREAK blue background"]  # of unequal length, so that they run apart
    both = pipe(prompts, steps=3, seed=[1, 2])
    for prompt, seed, image in zip(prompts, (1, 2), both, strict=True):
        (alone,) = pipe(prompt, steps=3, seed=seed)
        assert np.abs(np.asarray(alone).astype(int) - np.asarray(image)).max() <= 1


def test_weights_hold_each_encoders_mean_and_leave_the_pooled_text(pipe: Pipeline) -> None:
    plain, weighted = (pipe.encode([text], Reading("a1111")) for text in (PROMPT, "a photo of the (cat:1.5)"))
    first = tiny.CROSS_ATTENTION_DIM
    for part in (slice(0, first), slice(first, None)):
        assert torch.allclose(weighted[:, :-1, part].mean(), plain[:, :-1, part].mean(), atol=1e-6)
    assert torch.equal(weighted[:, -1], plain[:, -1]) and not torch.allclose(weighted[:, :-1], plain[:, :-1])


def test_the_pooled_text_of_several_chunks_is_that_of_the_first(pipe: Pipeline) -> None:
    whole, first, second = (pipe.encode([text], Reading("a1111")) for text in ("cat BREAK dog", "cat", "dog"))
    assert torch.equal(whole, torch.cat([first[:, :-1], second[:, :-1], first[:, -1:]], dim=1))


def test_sizes_are_in_the_recipe_and_refused_of_models_that_are_told_none(pipe: Pipeline) -> None:
    (image,) = pipe(PROMPT, steps=1, seed=0, original_size=(20, 30))
    recipe = read_recipe(image.info)
    assert recipe.original_size == (20, 30) and recipe.crop_top_left == (0, 0)
    again = pipe(recipe.prompt, width=recipe.width, height=recipe.height, **recipe.sampling() | {"seed": recipe.seed})
    assert np.array_equal(np.asarray(again[0]), np.asarray(image))


def test_a_model_that_is_told_no_sizes_says_so(tmp_path: Path) -> None:
    pipe = Pipeline.load(tiny.sd1_folder(tmp_path), precision="fp32")
    with pytest.raises(UsageError, match="not told sizes"):
        pipe("a cat", steps=1, original_size=(20, 30))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_short_precisions(folder: Path, precision: str) -> None:
    reference = np.asarray(Pipeline.load(folder, precision="fp32")(PROMPT, steps=3, seed=1)[0]).astype(float)
    image = np.asarray(Pipeline.load(folder, precision=precision)(PROMPT, steps=3, seed=1)[0]).astype(float)
    assert np.abs(image - reference).mean() < 4


def test_low_memory_is_the_same_to_the_bit(folder: Path, pipe: Pipeline) -> None:
    expected = np.asarray(pipe(PROMPT, steps=2, seed=3)[0])
    found = np.asarray(Pipeline.load(folder, precision="fp32", low_memory=True)(PROMPT, steps=2, seed=3)[0])
    assert np.array_equal(found, expected)


def test_what_an_engine_takes_is_the_context(pipe: Pipeline) -> None:
    """Engines take tensors alone: keys, values, and what is added to the embedding of the timestep."""
    from latentdiff.networks.conditioning import Conditioning
    from latentdiff.networks.layers import ProjectedContext

    unet, text, sizes = pipe.unet, pipe.encode([PROMPT]), pipe.told(SIDE, SIDE).positive
    context = Conditioning.of(unet, text, sizes=sizes).projected
    layers = [module.attn2 for module in unet.modules() if hasattr(module, "attn2")]
    again = ProjectedContext.of(layers, context.tensors(layers))
    assert len(context.tensors(layers)) == 2 * len(layers) + 1
    with torch.no_grad():
        assert torch.equal(unet(start(), 500.0, again), unet(start(), 500.0, context))
    other = Conditioning.of(unet, text, sizes=sizes + 100).projected
    assert not torch.equal(other.added, context.added)


def test_bare_text_is_refused_where_sizes_are_told(pipe: Pipeline) -> None:
    with pytest.raises(UsageError, match="told numbers beside the text"):
        pipe.unet(start(), 500.0, pipe.encode([PROMPT]))


def test_embeddings_of_diffusers_are_taken_with_their_pooled_text(
    pipe: Pipeline, peer: StableDiffusionXLPipeline
) -> None:
    from latentdiff.networks.pooled import with_pooled

    tokens, avoided, pooled, avoided_pooled = peer.encode_prompt(PROMPT, negative_prompt="dog")
    (expected,) = pipe(PROMPT, negative_prompt="dog", steps=2, seed=1)
    given = {
        "prompt_embeds": with_pooled(tokens, pooled),
        "negative_prompt_embeds": with_pooled(avoided, avoided_pooled),
    }
    (image,) = pipe(steps=2, seed=1, **given)
    assert np.abs(np.asarray(image).astype(int) - np.asarray(expected)).max() <= 1
    with pytest.raises(UsageError, match="pooled text in a row more"):
        pipe(steps=2, prompt_embeds=tokens)
    with pytest.raises(UsageError, match="with_pooled"):
        pipe(PROMPT, pooled_prompt_embeds=pooled)
