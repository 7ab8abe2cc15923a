"""Texts in the exact form of AUTOMATIC1111's web UI and Forge."""

from __future__ import annotations

import time

import pytest

from latentdiff.errors import DataError
from latentdiff.recipe import read_recipe
from latentdiff.request.foreign import read_account
from latentdiff.request.foreign.account import Account
from latentdiff.request.infotext import split

# As their writer puts it: settings in this order, values with commas, colons or line breaks as JSON strings.
FORGE = (
    'a (red:1.2) fox, it\'s "quoted", ratio 16:9 <lora:sty:0.8>\nBREAK [cat:dog:0.5] \\(x\\)\n'
    "Negative prompt: blurry, (bad:1.3)\nworst: quality\n"
    "Steps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7, Seed: 965400086, Size: 512x768, "
    "Model hash: 6ce0161689, Model: v1-5-pruned-emaonly, VAE hash: 735e4c3a44, VAE: vae-ft-mse-840000.safetensors, "
    'Clip skip: 2, ENSD: 31337, Lora hashes: "sty: 0123456789ab, other: ba9876543210", TI hashes: "bad: 1", '
    'Template: "a {red|blue} fox,\\n\\"so\\"", Emphasis: Original, Version: f2.0.1v1.10.1-previous-664-gd557aef9'
)


def account(text: str) -> Account:
    found = read_account({"parameters": text})
    assert found is not None
    return found


def verdict(found: Account, name: str) -> tuple[str, str]:
    (one,) = [field for field in found.fields if field.name == name]
    return one.value, one.verdict


def short(**settings: str) -> str:
    """A text of the fewest settings and these, which may take the place of some."""
    said = {"Steps": "20", "Sampler": "Euler a", "CFG scale": "7", "Seed": "1", "Size": "512x512"} | {
        name.replace("_", " "): value for name, value in settings.items()
    }
    return "a cat\n" + ", ".join(f"{name}: {value}" for name, value in said.items())


def test_every_field_of_a_text_of_forge() -> None:
    found = account(FORGE)
    assert found.options == {
        "prompt": 'a (red:1.2) fox, it\'s "quoted", ratio 16:9 <lora:sty:0.8>\nBREAK [cat:dog:0.5] \\(x\\)',
        "negative_prompt": "blurry, (bad:1.3)\nworst: quality", "prompt_syntax": "a1111", "steps": 20,
        "sampler": "dpmpp-2m", "spacing": "karras", "discard_penultimate": False, "guidance_scale": 7.0,
        "seed": 965400086, "width": 512, "height": 768, "clip_skip": 2, "seed_delta": 31337, "noise_source": "nv",
        "noise_start": "sigma", "told_timesteps": "exact",
    }  # fmt: skip
    assert (found.model, found.model_hash) == ("v1-5-pruned-emaonly", "6ce0161689")
    assert found.model_options == {"vae": "vae-ft-mse-840000.safetensors"}
    assert not found.lacking and not found.of("approximated", "refused")
    said = split(FORGE).settings
    assert {one.name for one in found.fields} >= said.keys() and said["Template"] == 'a {red|blue} fox,\n"so"'


@pytest.mark.parametrize("name", split(FORGE).settings)
def test_no_field_is_silent(name: str) -> None:
    """Each stands in the account with its value, once."""
    verdict(account(FORGE), name)


def test_what_is_not_said_means_what_the_program_takes_it_for() -> None:
    found = account(short(Version="v1.10.1"))
    assert (found.options["clip_skip"], found.options["noise_source"], found.options["spacing"]) == (1, "nv", "normal")
    assert verdict(found, "Clip skip (not said)") == ("1", "honoured")
    assert verdict(found, "RNG (not said)") == ("GPU", "honoured")
    assert verdict(found, "Schedule type (not said)") == ("Automatic", "honoured")
    assert "negative_prompt" not in found.options


@pytest.mark.parametrize(
    ("settings", "expected", "judged"),
    [
        ({"Sampler": "DPM++ 2M Karras", "Version": "v1.6.0"}, ("dpmpp-2m", "karras"), "honoured"),
        ({"Sampler": "DPM++ 2M", "Version": "v1.6.0"}, ("dpmpp-2m", "normal"), "honoured"),
        ({"Sampler": "DPM++ 2M", "Version": "v1.9.0"}, ("dpmpp-2m", "karras"), "honoured"),
        ({"Sampler": "DPM++ 2M"}, ("dpmpp-2m", "karras"), "approximated"),
        ({"Sampler": "Euler a"}, ("euler-a", "normal"), "honoured"),
        ({"Sampler": "Euler a", "Schedule type": "SGM Uniform"}, ("euler-a", "sgm-uniform"), "honoured"),
        ({"Sampler": "DPM2 a", "Schedule type": "Automatic"}, ("dpm2-a", "karras"), "honoured"),
    ],
)
def test_schedules(settings: dict[str, str], expected: tuple[str, str], judged: str) -> None:
    found = account(short(**settings))
    assert (found.options["sampler"], found.options["spacing"]) == expected
    assert found.options["discard_penultimate"] is settings["Sampler"].startswith("DPM2")
    assert judged in {one.verdict for one in found.fields if one.name.startswith(("Schedule type", "Sampler"))}
    assert bool(found.of("approximated")) == (judged == "approximated")


@pytest.mark.parametrize(
    ("settings", "options"),
    [
        ({"RNG": "CPU"}, {"noise_source": "cpu"}),
        ({"RNG": "NV"}, {"noise_source": "nv"}),
        ({"SGM noise multiplier": "True"}, {"noise_start": "unit"}),
        ({"Sampler": "DDIM", "Eta DDIM": "0.5"}, {"eta": 0.5, "noise_start": "unit", "spacing": "leading"}),
        ({"Eta": "0.67"}, {"eta": 0.67}),
        ({"Sigma churn": "5", "Sigma noise": "1.01"}, {"s_churn": 5.0, "s_noise": 1.01}),
        ({"Emphasis": "None"}, {"prompt_syntax": "plain"}),
    ],
)
def test_settings_that_are_honoured(settings: dict[str, str], options: dict[str, object]) -> None:
    found = account(short(**settings))
    assert {name: found.options[name] for name in options} == options and not found.of("refused")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("Hires upscale", "20"), ("Hires steps", "10"), ("ControlNet 0", '"Module: canny, Weight: 1"'),
        ("ADetailer model", "face_yolov8n.pt"), ("Variation seed", "3"), ("Variation seed strength", "0.2"),
        ("Refiner", "xl [1]"), ("Face restoration", "CodeFormer"), ("Seed resize from", "512x512"),
        ("Emphasis", "No norm"), ("RNG", "XPU"), ("Token merging ratio", "0.5"), ("Some extension", "on"),
    ],
)  # fmt: skip
def test_what_is_not_here_is_refused_by_name_and_the_rest_is_made(name: str, value: str) -> None:
    found = account(short(**{name: value}))
    (one,) = found.of("refused")
    assert (one.name, one.value) == (name, value.strip('"')) and one.why and not found.lacking


def test_the_strength_of_a_hires_pass_does_not_make_it_image_to_image() -> None:
    found = account(short(**{"Denoising strength": "0.7", "Hires upscale": "20"}))
    assert found.task == "generate" and {one.name for one in found.of("refused")} == {
        "Denoising strength",
        "Hires upscale",
    }


@pytest.mark.parametrize("steps", [7, 20, 30])
@pytest.mark.parametrize("strength", ["0.3", "0.75", "1.0"])
def test_image_to_image_takes_as_many_steps_as_there(steps: int, strength: str) -> None:
    found = account(short(**{"Steps": str(steps), "Denoising strength": strength}))
    assert found.task == "edit" and "another image" in found.of("approximated")[0].why
    assert found.strength and int(steps * found.strength) == int(min(float(strength), 0.999) * steps) + 1
    assert account(short(**{"Denoising strength": "0.5", "Mask blur": "4"})).task == "inpaint"
    with pytest.raises(DataError, match="made from another one.*latentdiff import"):
        read_recipe({"parameters": short(**{"Denoising strength": strength})})


def test_lines_behind_the_settings_are_accounted_for() -> None:
    found = account(FORGE + "\nTemplate: a {b|c}\nNegative Template: x: y\nand more")
    assert found.options == account(FORGE).options
    assert [one.value for one in found.fields if one.name == "Negative Template"] == ["x: y\nand more"]


def test_large_latents_of_a_gpu_depend_on_the_gpu() -> None:
    assert verdict(account(short(Size="1024x1024")), "RNG (not said)")[1] == "approximated"
    assert verdict(account(short(Size="1024x1024", RNG="NV")), "RNG")[1] == "honoured"


@pytest.mark.parametrize(
    ("text", "lacks"),
    [
        (short(Sampler="DPM adaptive"), "Sampler"),
        (short(**{"Schedule type": "Turbo"}), "Schedule type"),
        (short(Seed="x"), "Seed"),
        (short(Size="512"), "Size"),
        ("a cat\nSteps: 20, Sampler: Euler, CFG scale: 7, Size: 64x64", "Seed"),
        (short(Seed="9" * 5000), "Seed"),
        (short(**{"CFG scale": "nan"}), "CFG scale"),
    ],
)
def test_without_these_there_is_no_image(text: str, lacks: str) -> None:
    found = account(text)
    assert len(found.lacking) == 1 and found.lacking[0].startswith(f"{lacks}:")
    with pytest.raises(DataError, match=f"lacks or has an unknown value of: {lacks}"):
        read_recipe({"parameters": text})


@pytest.mark.parametrize(
    "part",
    ["a: ", '"', "Steps: 1, ", "Steps: \n", "[a:", "[:", ":" * 9, "k: \"\\", "Steps: 1, Seed: 2, Size: 1x1\n", "\n", " ",
     "Negative prompt:", "<lora:", "((", "Template: x\n", "a"],
)  # fmt: skip
def test_time_is_in_proportion_to_the_length(part: str) -> None:
    text = (FORGE.split("\n")[-1] + "\n" if "Template" in part else "") + part * (200_000 // len(part))
    start = time.process_time()
    read_account({"parameters": text})
    assert time.process_time() - start < 5.0  # a fraction of a second; quadratic is more than 25


def test_a_prompt_is_no_text_of_settings() -> None:
    assert read_account({"parameters": "only: words"}) is None
    with pytest.raises(DataError, match="lone surrogate"):
        read_account({"parameters": "a \ud800 cat"})
