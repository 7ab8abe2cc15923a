"""Metadata in the exact form of Fooocus' two schemes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from latentdiff.image import open_image
from latentdiff.recipe import read_recipe
from latentdiff.request.foreign import read_account
from latentdiff.request.foreign.account import Account, NamedLoRA

SAID = {
    "adm_guidance": "(1.5, 0.8, 0.3)", "base_model": "juggernautXL_v8", "base_model_hash": "aeb7e9e689", "clip_skip": 2,
    "full_negative_prompt": ["blurry"], "full_prompt": ["a cat, cinematic", "still"], "guidance_scale": 4,
    "lora_combined_1": "offset.safetensors : 0.1", "lora_combined_2": "True : b.safetensors : 0.5",
    "lora_combined_3": "False : c.safetensors : 1.0", "metadata_scheme": "fooocus", "negative_prompt": "blurry",
    "performance": "Speed", "prompt": "a cat", "prompt_expansion": "a cat, intricate", "refiner_model": "None",
    "resolution": "(896, 1152)", "sampler": "dpmpp_2m", "scheduler": "karras", "seed": "3125837478541214843",
    "sharpness": 2, "steps": 30, "styles": "['Fooocus V2']", "vae": "Default (model)", "version": "Fooocus v2.4.3",
}  # fmt: skip
TEXT = (
    "a cat, cinematic\nNegative prompt: blurry\nSteps: 30, Sampler: DPM++ 2M Karras, Seed: 5, Size: 896x1152, "
    'CFG scale: 4, Sharpness: 2, ADM Guidance: "(1.5, 0.8, 0.3)", Model: juggernautXL_v8, Model hash: aeb7e9e689, '
    "Performance: Speed, Scheduler: karras, VAE: Default (model), Raw prompt: a cat, Raw negative prompt: blurry, "
    'Lora hashes: "offset: 4852686128", Lora weights: "offset: 0.1", Version: Fooocus v2.4.3'
)


def account(said: dict[str, Any], scheme: str = "fooocus") -> Account:
    found = read_account({"parameters": json.dumps(said), "fooocus_scheme": scheme})
    assert found is not None
    return found


def test_the_scheme_of_its_own() -> None:
    found = account(SAID)
    assert found.options == {
        "prompt": "a cat, cinematic, still", "negative_prompt": "blurry", "prompt_syntax": "comfy", "clip_skip": 2,
        "guidance_scale": 4.0, "sampler": "dpmpp-2m", "spacing": "karras", "seed": 3125837478541214843, "steps": 30,
        "width": 896, "height": 1152, "noise_source": "comfy", "noise_start": "unit", "told_timesteps": "whole",
    }  # fmt: skip
    assert found.loras == (NamedLoRA("offset.safetensors", "0.1"), NamedLoRA("b.safetensors", "0.5"))
    assert {one.name for one in found.of("refused")} == {"(model)", "adm_guidance", "sharpness"} and not found.lacking
    assert {one.name for one in found.fields} >= SAID.keys() - {"prompt", "negative_prompt"}


def test_the_scheme_of_a1111() -> None:
    for scheme in ({"fooocus_scheme": "a1111"}, {}):
        found = read_account({"parameters": TEXT, **scheme})
        assert found and found.program == "Fooocus v2.4.3" and found.model == "juggernautXL_v8"
        assert (found.options["prompt"], found.options["sampler"], found.options["spacing"]) == (
            "a cat, cinematic", "dpmpp-2m", "karras",
        )  # fmt: skip
        assert found.loras == (NamedLoRA("offset", "0.1"),) and not found.lacking
        assert {one.name for one in found.of("refused")} == {"(model)", "adm_guidance", "sharpness"}


def test_older_hashes_hold_the_weights() -> None:
    text = TEXT.replace('"offset: 4852686128", Lora weights: "offset: 0.1"', '"offset: 4852686128: 0.2, b: 12: 1"')
    found = read_account({"parameters": text})
    assert found and found.loras == (NamedLoRA("offset", "0.2"), NamedLoRA("b", "1"))


@pytest.mark.parametrize(
    ("name", "value"), [("sampler", "dpm_fast"), ("scheduler", "turbo"), ("resolution", "wide"), ("seed", "x")]
)
def test_without_these_there_is_no_image(name: str, value: str) -> None:
    assert account(SAID | {name: value}).lacking[0].startswith(f"{name}:")


def test_json_of_another_program_is_none_of_it() -> None:
    assert read_account({"parameters": '{"sui_image_params": {}}'}) is None


@pytest.mark.parametrize("ending", ["jpg", "webp"])
def test_exif_of_its_images(tmp_path: Path, ending: str) -> None:
    """It writes UserComment and MakerNote into the first directory, where they do not belong."""
    exif = Image.Exif()
    exif[0x9286], exif[0x0131], exif[0x927C] = json.dumps(SAID), "Fooocus v2.4.3", "fooocus"
    Image.new("RGB", (8, 8)).save(tmp_path / f"a.{ending}", exif=exif)
    assert read_recipe(open_image(tmp_path / f"a.{ending}").info).prompt == "a cat, cinematic, still"
