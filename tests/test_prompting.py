"""Grammar, long prompts and clip skip in whole images, beside diffusers fed with the embeddings that result."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch

from latentdiff import Pipeline
from latentdiff.errors import UsageError
from latentdiff.networks.text_embedding import Reading
from latentdiff.prompts.notice import PromptWarning
from latentdiff.recipe import read_recipe
from tests import peers

A1111 = Reading("a1111")
OPTIONS = {"steps": 6, "seed": 5, "guidance_scale": 5.0, "progress": False}
LATENTS = {**OPTIONS, "output": "latents"}
BATCH_NOISE = 1e-4


@cache
def pipe() -> Pipeline:
    return peers.ours("sd1")


def array(image) -> np.ndarray:
    return np.asarray(image).astype(int)


def close(one, other) -> bool:
    return float((one - other).abs().max()) < BATCH_NOISE


@pytest.mark.parametrize(
    ("prompt", "clip_skip"),
    [("a (cat:1.4) on [blue] ((red)) background", 1), ("a photo of the cat " * 60, 1), ("a cat BREAK (dog:0.7)", 2)],
)
def test_same_image_as_diffusers_with_the_embeddings(prompt, clip_skip):
    from diffusers import DDIMScheduler

    peer = peers.theirs("sd1")
    scheduler, peer.scheduler = peer.scheduler, DDIMScheduler.from_config(peer.scheduler.config, clip_sample=False)
    positive, negative = pipe().encode([prompt, ""], Reading("a1111", clip_skip)).chunk(2)
    # diffusers wants both of one length, so the negative prompt has as many chunks here
    chunks = positive.shape[1] // 77
    try:
        generator = torch.Generator().manual_seed(5)
        expected = peer(
            prompt_embeds=positive, negative_prompt_embeds=negative, generator=generator, num_inference_steps=6,
            guidance_scale=5.0, output_type="np",
        ).images[0]  # fmt: skip
    finally:
        peer.scheduler = scheduler
    found = pipe()(
        prompt, negative_prompt=" BREAK ".join([""] * chunks), clip_skip=clip_skip, spacing="leading", **OPTIONS
    )[0]
    assert np.abs(array(found) - (expected * 255).round()).max() <= 1


def test_grammar_is_the_default_and_plain_reads_letters():
    with_grammar = pipe()("a (cat:1.5)", **LATENTS)
    assert not torch.equal(with_grammar, pipe()("a (cat:1.5)", prompt_syntax="plain", **LATENTS))
    assert not torch.equal(with_grammar, pipe()("a (cat:1.5)", prompt_syntax="comfy", **LATENTS))
    for syntax in ("a1111", "comfy", "plain"):
        assert torch.equal(pipe()("a cat", prompt_syntax=syntax, **LATENTS), pipe()("a cat", **LATENTS))


def test_a_switch_at_the_end_changes_nothing_and_one_at_the_start_everything():
    cat, dog = (pipe()(f"a {word}", **LATENTS) for word in ("cat", "dog"))
    assert torch.equal(pipe()("a [cat:dog:1.0]", **LATENTS), cat)
    assert torch.equal(pipe()("a [cat:dog:0]", **LATENTS), dog)
    half = pipe()("a [cat:dog:0.5]", **LATENTS)
    assert not torch.equal(half, cat) and not torch.equal(half, dog)
    assert torch.equal(pipe()("[a cat|a cat]", **LATENTS), cat)


def test_composition_of_one_text_with_itself_is_that_text():
    cat = pipe()("a cat", **LATENTS)
    assert close(pipe()("a cat:0.5 AND a cat:0.5", **LATENTS), cat)
    assert close(pipe()("a cat AND a dog:0", **LATENTS), cat)
    doubled = pipe()("a cat", **{**LATENTS, "guidance_scale": 10.0})
    assert close(pipe()("a cat AND a cat", **LATENTS), doubled)


def test_an_image_does_not_depend_on_its_neighbours():
    prompts = ["a cat", "a photo of the dog " * 40, "a cat AND a dog", "[cat|dog]"]
    together = pipe()(prompts, negative_prompt=["", "red", "", "dog " * 80], **LATENTS)
    for index, (prompt, negative) in enumerate(zip(prompts, ["", "red", "", "dog " * 80], strict=True)):
        alone = pipe()(prompt, negative_prompt=negative, **{**LATENTS, "seed": 5 + index})
        assert close(together[index : index + 1], alone)


def test_the_recipe_says_how_prompts_were_read():
    image = pipe()("a (cat:1.5)", clip_skip=2, prompt_syntax="comfy", **OPTIONS)[0]
    recipe = read_recipe(image.info)
    assert (recipe.prompt_syntax, recipe.clip_skip) == ("comfy", 2)
    assert "Clip skip: 2" in image.info["parameters"]
    again = pipe()(recipe.prompt, width=64, height=64, progress=False, **recipe.sampling())[0]
    assert np.array_equal(array(again), array(image))


def test_recipes_from_before_mean_plain():
    image = pipe()("a (cat:1.5)", prompt_syntax="plain", **OPTIONS)[0]
    text = image.info["latentdiff"].replace('"prompt_syntax": "plain", ', "").replace('"clip_skip": 1, ', "")
    assert "prompt_syntax" not in text
    assert read_recipe({"latentdiff": text}).prompt_syntax == "plain"


def test_texts_of_other_programs_mean_their_grammar():
    text = "a (cat:1.5)\nSteps: 6, Sampler: DDIM, CFG scale: 5, Seed: 5, Size: 64x64, Clip skip: 2"
    recipe = read_recipe({"parameters": text})
    assert (recipe.prompt_syntax, recipe.clip_skip) == ("a1111", 2)


def test_tasks_that_cannot_follow_say_so():
    with pytest.raises(UsageError, match="expected a prompt without AND"):
        pipe().encode(["a cat AND a dog"], A1111)
    with pytest.raises(UsageError, match="found 'a \\[cat:dog:0.5\\]'"):
        pipe().encode(["a [cat:dog:0.5]"], A1111)


def test_shorter_prompts_are_filled_up_with_empty_chunks():
    short, long = pipe().encode(["cat", "cat " * 80], A1111)
    assert torch.equal(short[:77], pipe().encode(["cat"])[0]) and torch.equal(short[77:], pipe().encode([""])[0])
    assert long.shape == (154, 32)


def test_long_plain_prompts_are_quoted_short():
    with pytest.warns(PromptWarning) as caught:
        pipe().encode(["x" * 5000])
    assert len(str(caught[0].message)) < 250


def test_embeddings_in_place_of_prompts():
    expected = pipe()(["a cat", "the dog"], negative_prompt="red", num_images=2, **LATENTS)
    given = {"prompt_embeds": pipe().encode(["a cat", "the dog"]), "negative_prompt_embeds": pipe().encode(["red"])}
    assert torch.equal(pipe()(num_images=2, **given, **LATENTS), expected)
    assert torch.equal(
        pipe()("a cat", negative_prompt_embeds=given["negative_prompt_embeds"], **LATENTS),
        pipe()("a cat", negative_prompt="red", **LATENTS),
    )
    recipe = read_recipe(pipe()(**given, **OPTIONS)[0].info)
    assert recipe.given_embeddings and recipe.prompt == ""


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "expected a prompt, or prompt_embeds in its place; found neither"),
        ({"prompt": "a", "prompt_embeds": torch.zeros(1, 77, 32)}, "found both"),
        ({"prompt_embeds": torch.zeros(1, 77, 16)}, r"prompt_embeds of shape \(N, L, 32\).*found \(1, 77, 16\)"),
        ({"prompt_embeds": torch.full((1, 77, 32), torch.nan)}, "finite prompt_embeds"),
        ({"prompt": ["a", "b", "c"], "negative_prompt_embeds": torch.zeros(2, 77, 32)}, "one for all images"),
        ({"prompt": "a", "negative_prompt": "b", "negative_prompt_embeds": torch.zeros(1, 77, 32)}, "found both"),
        ({"prompt_embeds": "a"}, "prompt_embeds to be a tensor"),
    ],
)
def test_embeddings_that_do_not_fit(given, message):
    with pytest.raises(UsageError, match=message):
        pipe()(**given, **LATENTS)


def test_explain_uses_the_models_own_tokens():
    assert "4 tokens in 1 chunk of 75" in str(pipe().explain("a photo of [cat|dog]", steps=1))


@torch.no_grad()
def test_training_sees_what_generation_reads():
    """A caption of 300 tokens, in chunks: the same embeddings as a prompt of the same words."""
    from latentdiff.training.data.captions import lost_words, token_chunks
    from latentdiff.training.loss import encode_tokens

    caption = "a photo of the cat , dog on red background " * 30
    tokens = torch.from_numpy(token_chunks(pipe().tokenizer, [caption], "chunk"))
    assert tokens.shape[1] >= 4 and not lost_words(pipe().tokenizer, caption, "chunk")
    trained = encode_tokens(pipe().text_encoder, tokens)
    torch.testing.assert_close(trained, pipe().encode([caption], A1111), rtol=1e-5, atol=1e-5)
    assert pipe()(caption, **LATENTS).isfinite().all()
