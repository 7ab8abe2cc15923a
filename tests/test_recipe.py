from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from latentdiff.errors import DataError
from latentdiff.recipe import Recipe, read_recipe
from latentdiff.request.options import NoiseName, SamplerName, SpacingName, StartName

# How AUTOMATIC1111's web UI splits the last line of its text (its format, in our words).
WEB_UI_SETTING = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')

finite = st.floats(allow_nan=False, allow_infinity=False)
text = st.text(st.characters(codec="utf-8"))
recipes = st.builds(
    Recipe,
    prompt=text,
    negative_prompt=text,
    seed=st.integers(0, 2**64 - 1),
    steps=st.integers(1, 1000),
    sampler=st.sampled_from(get_args(SamplerName)),
    eta=st.floats(0, 1),
    guidance_scale=finite,
    guidance_rescale=st.floats(0, 1),
    guidance_interval=st.none() | st.tuples(st.floats(0, 5), st.floats(6, 20)),
    spacing=st.none() | st.sampled_from(get_args(SpacingName)),
    noise_source=st.sampled_from(get_args(NoiseName)),
    noise_start=st.none() | st.sampled_from(get_args(StartName)),
    noise_index=st.integers(0, 9),
    seed_delta=st.integers(-9, 2**32),
    discard_penultimate=st.booleans(),
    cache_interval=st.integers(1, 10),
    cache_branch=st.integers(0, 11),
    cache_centre=st.none() | st.integers(0, 49),
    width=st.integers(8, 4096),
    height=st.integers(8, 4096),
    model=text,
    model_hash=st.text("0123456789abcdef", min_size=64, max_size=64),
    prediction_type=st.none() | st.just("v_prediction"),
    ema=st.booleans(),
    given_latents=st.booleans(),
    given_embeddings=st.booleans(),
    precision=st.sampled_from(["fp32", "bf16"]),
    device=text,
    versions=st.dictionaries(text, text, max_size=3),
    task=st.sampled_from(["generate", "edit"]),
    task_settings=st.dictionaries(text, st.none() | finite | text | st.lists(st.integers(), max_size=2), max_size=3),
    sources=st.dictionaries(text, st.dictionaries(text, text, max_size=2), max_size=2),
)

FOX = Recipe(
    prompt="a fox, 狐\nin the snow", negative_prompt="blurry", seed=7, steps=30, sampler="dpmpp-2m", guidance_scale=7.5,
    width=512, height=768, model="a, b", model_hash="0123456789abcdef", versions={"latentdiff": "0.1.0"},
)  # fmt: skip


@given(recipes)
def test_json_reads_what_it_writes(recipe):
    written = recipe.to_json()
    assert written.isascii()
    assert Recipe.from_json(written) == recipe
    assert read_recipe(recipe.to_chunks()) == recipe


def test_parameters_are_those_of_the_web_uis():
    assert FOX.to_parameters() == (
        "a fox, 狐\nin the snow\nNegative prompt: blurry\n"
        "Steps: 30, Sampler: DPM++ 2M, CFG scale: 7.5, Seed: 7, Size: 512x768, Model hash: 0123456789, "
        'Model: "a, b", RNG: CPU, SGM noise multiplier: True, Version: latentdiff 0.1.0'
    )


def web_ui_reads(text):
    """The settings that a web UI takes from a text, with what it puts where the text says nothing (their documentation)."""
    read = {key: json.loads(value) if value[:1] == '"' else value for key, value in WEB_UI_SETTING.findall(text)}
    return {"Schedule type": "Automatic", "RNG": "GPU", "Clip skip": "1", "SGM noise multiplier": "False"} | read


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"spacing": "karras"}, {"Sampler": "DPM++ 2M", "Schedule type": "Karras", "SGM noise multiplier": "True"}),
        ({"spacing": "normal"}, {"Schedule type": "Uniform"}),
        ({"spacing": "exponential"}, {"Schedule type": "Exponential"}),
        ({"spacing": "trailing", "noise_source": "comfy", "noise_index": 2}, {"RNG": "CPU"}),
        ({"noise_source": "nv", "noise_start": "sigma"}, {"RNG": "NV", "SGM noise multiplier": "False"}),
        ({"sampler": "euler-a", "spacing": "normal", "eta": 0.5}, {"Eta": "0.5", "SGM noise multiplier": "False"}),
        ({"sampler": "euler", "spacing": "leading"}, {"SGM noise multiplier": "True"}),
        ({"sampler": "ddim", "spacing": "leading", "eta": 0.5}, {"Sampler": "DDIM", "Eta DDIM": "0.5", "RNG": "CPU"}),
        ({"clip_skip": 2, "seed_delta": 31337}, {"Clip skip": "2", "ENSD": "31337"}),
        ({"sampler": "dpm2", "spacing": "karras", "discard_penultimate": True}, {"Discard penultimate sigma": "True"}),
        ({"prompt": "a (b)"}, {"Emphasis": "None"}),
    ],
)
def test_web_uis_take_the_same_from_the_text(options, words):
    """A1111's parser, by its documented grammar, ends with what the recipe says; and so do we."""
    recipe = replace(FOX, **options)
    text = recipe.to_parameters()
    read = web_ui_reads(text.split("\n")[-1])
    assert {key: read[key] for key in words} == words
    again = Recipe.from_parameters(text)
    assert {name: getattr(again, name) for name in options} == options


def test_a_text_of_before_the_words_of_the_web_uis_is_read():
    recipe = read_recipe(
        {
            "parameters": "a fox\nSteps: 30, Sampler: DPM++ 2M, CFG scale: 7.5, Seed: 7, Size: 64x64, Model: m, "
            "Eta DDIM: 0.5, Spacing: karras, Prompt syntax: a1111, Version: latentdiff 0.1.0"
        }
    )
    assert (recipe.sampler, recipe.spacing, recipe.eta, recipe.noise_source, recipe.noise_start) == (
        "dpmpp-2m", "karras", 0.5, "cpu", None,
    )  # fmt: skip


def is_plain(recipe):
    """Whether the text of the web UIs, which has no escapes for prompts, can hold it."""
    prompts = (recipe.prompt, recipe.negative_prompt)
    return all(p == p.strip() and "Negative prompt:" not in p for p in prompts)


@given(recipes.filter(is_plain))
def test_parameters_read_what_they_write(recipe):
    again = Recipe.from_parameters(recipe.to_parameters())
    for name in (
        "prompt", "negative_prompt", "seed", "steps", "sampler", "eta", "guidance_scale", "guidance_rescale",
        "guidance_interval", "width", "height", "model", "noise_source", "noise_start", "noise_index", "seed_delta",
        "discard_penultimate",
    ):  # fmt: skip
        assert getattr(again, name) == getattr(recipe, name), name
    assert again.spacing == recipe.spacing
    assert again.cache_interval == recipe.cache_interval
    if recipe.cache_interval > 1:
        assert (again.cache_branch, again.cache_centre) == (recipe.cache_branch, recipe.cache_centre)
    assert again.model_hash == recipe.model_hash[:10]


def test_recipes_without_the_newer_fields_are_read():
    old = json.loads(FOX.to_json())
    for name in ("task", "task_settings", "sources", "loras", "cache_interval", "cache_branch", "cache_centre"):
        del old[name]
    assert Recipe.from_json(json.dumps(old)) == FOX


@given(recipes)
def test_web_uis_read_the_settings(recipe):
    settings = dict(WEB_UI_SETTING.findall(recipe.to_parameters().split("\n")[-1]))
    assert settings["Steps"] == str(recipe.steps)
    assert settings["Seed"] == str(recipe.seed)
    assert settings["Size"] == f"{recipe.width}x{recipe.height}"
    assert float(settings["CFG scale"]) == recipe.guidance_scale


def test_text_of_another_program():
    recipe = read_recipe(
        {
            "parameters": "a castle\nat dusk\nNegative prompt: people,\nfog\nSteps: 20, Sampler: Euler, "
            "Schedule type: Automatic, CFG scale: 7, Seed: 965400086, Size: 512x512, Model hash: 6ce0161689, "
            'Model: v1-5, Lora hashes: "a: 1, b: 2"'
        }
    )
    assert (recipe.prompt, recipe.negative_prompt) == ("a castle\nat dusk", "people,\nfog")
    assert (recipe.sampler, recipe.steps, recipe.guidance_scale, recipe.seed) == ("euler", 20, 7.0, 965400086)
    assert (recipe.model, recipe.model_hash, recipe.spacing) == ("v1-5", "6ce0161689", "normal")
    assert (recipe.noise_source, recipe.noise_start, recipe.prompt_syntax) == ("nv", "sigma", "a1111")


@given(text)
def test_hostile_text_is_a_data_error_or_a_recipe(content):
    for read in (Recipe.from_json, Recipe.from_parameters):
        try:
            assert isinstance(read(content), Recipe)
        except DataError as error:
            assert "\n" not in str(error)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid at JSON"),
        ("[" * 100_000, "not valid at JSON"),
        ("[]", "should be an object"),
        ("{}", "not valid at prompt: Field required"),
        (FOX.to_json().replace('"steps": 30', '"steps": "30"'), "not valid at steps"),
        (FOX.to_json().replace('"seed": 7', '"seed": true'), "not valid at seed"),
        (FOX.to_json().replace('"seed": 7', '"seed": 7, "code": "x"'), "not valid at code: Unexpected"),
        (FOX.to_json().replace('"schema": 1', '"schema": 2'), "written by a newer latentdiff"),
    ],
)
def test_bad_json(content, message):
    with pytest.raises(DataError, match=message):
        Recipe.from_json(content)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "only a prompt",
        "cat\nSteps: 20",
        "cat\nSteps: 20, Sampler: DPM adaptive, CFG scale: 7, Seed: 1, Size: 64x64",
        "cat\nSteps: 20, Sampler: DDIM, CFG scale: 7, Seed: 1, Size: 64",
        "cat\nSteps: x, Sampler: DDIM, CFG scale: 7, Seed: 1, Size: 64x64",
    ],
)
def test_bad_parameters(content):
    with pytest.raises(DataError, match="lacks or has an unknown value"):
        Recipe.from_parameters(content)


@pytest.mark.parametrize(
    ("name", "value"),
    [("sampler", "ddmi"), ("spacing", "x"), ("noise_source", "x"), ("steps", 0), ("seed", -1), ("eta", 2.0), ("clip_skip", 0),
     ("hires_upscaler", "x"), ("sigmas", []), ("guidance_interval", [2.0, 1.0]), ("seamless", "z")],
)  # fmt: skip
def test_options_that_no_call_takes(name, value):
    """What is read can be written again and asked for again."""
    fields = {**json.loads(FOX.to_json()), "hires": 2.0, name: value}
    with pytest.raises(DataError, match=f"recipe is not valid: expected {name} to be"):
        Recipe.from_json(json.dumps(fields))


def test_a_task_without_steps():
    fields = {**json.loads(FOX.to_json()), "task": "upscale", "steps": 0, "sampler": ""}
    assert "Task: upscale" in Recipe.from_json(json.dumps(fields)).to_parameters()
    for wrong in ({"task": "generate"}, {"sampler": "x"}, {"steps": 1}):
        with pytest.raises(DataError, match="expected (steps|sampler) to be"):
            Recipe.from_json(json.dumps(fields | wrong))


def test_a_recipe_names_no_file_anywhere(tmp_path):
    """What is there, too: files come from beside the image, by their hashes."""
    (tmp_path / "up.pth").touch()
    path = str(tmp_path / "up.pth")
    fields = {**json.loads(FOX.to_json()), "hires": 2.0, "hires_upscaler": path}
    with pytest.raises(DataError, match="expected hires_upscaler to be one of"):
        Recipe.from_json(json.dumps(fields))
    known = {"sources": {"hires_upscaler": {"file": "up.pth", "sha256": "0"}}, "hires_upscaler": "up.pth"}
    assert Recipe.from_json(json.dumps(fields | known)).hires_upscaler == "up.pth"


@pytest.mark.parametrize("said", ["Seed: -1", "Steps: 0", "Clip skip: 0", "Noise source: x", "Guidance interval: 2.0 to 1.0"])
def test_options_in_a_text_that_no_call_takes(said):
    name = said.partition(":")[0]
    settings = {"Steps": "20", "Sampler": "DDIM", "CFG scale": "7", "Seed": "1", "Size": "64x64", "RNG": "CPU"}
    text = ", ".join(f"{key}: {value}" for key, value in settings.items() if key != name)
    with pytest.raises(DataError, match="recipe is not valid: expected"):
        Recipe.from_parameters(f"cat\n{text}, {said}")


@pytest.mark.parametrize("info", [{}, {"parameters": 3}, {"latentdiff": b"{}", "dpi": (72, 72)}])
def test_no_recipe(info):
    with pytest.raises(DataError, match="carries no recipe"):
        read_recipe(info)


@dataclass(frozen=True)
class Own:
    strength: float
    box: tuple[int, int] = (0, 0)


def test_settings_of_a_task():
    assert replace(FOX, task_settings={"strength": 1, "box": [2, 3]}).settings_as(Own) == Own(1.0, (2, 3))
    for settings, message in [
        ({}, "task_settings.strength: Field required"),
        ({"strength": "1"}, "task_settings.strength"),
        ({"strength": 1.0, "box": [1]}, "task_settings.box"),
        ({"strength": 1.0, "other": 1}, "does not know: .'other'."),
    ]:
        with pytest.raises(DataError, match=message):
            replace(FOX, task_settings=settings).settings_as(Own)


def test_task_in_the_text_of_the_web_uis():
    edited = replace(FOX, task="edit", task_settings={"strength": 0.5})
    assert "Denoising strength: 0.5, Task: edit" in edited.to_parameters()
    assert Recipe.from_parameters(edited.to_parameters()).task == "edit"
