"""Metadata in the exact form of InvokeAI's versions."""

from __future__ import annotations

import json
from typing import Any

import pytest

from latentdiff.errors import DataError
from latentdiff.request.foreign import read_account
from latentdiff.request.foreign.account import Account, NamedLoRA

VERSION_3 = {
    "app_version": "3.3.0post3", "generation_mode": "txt2img", "positive_prompt": "a fox, (red)",
    "negative_prompt": "low quality",
    "width": 768, "height": 432, "seed": 356120443, "rand_device": "cpu", "cfg_scale": 7.5, "steps": 50,
    "scheduler": "dpmpp_2m_k", "clip_skip": 1, "model": {"model_name": "amixx_3", "base_model": "sd-1", "model_type": "main"},
    "controlnets": [], "ipAdapters": [], "t2iAdapters": [],
    "loras": [{"lora": {"model_name": "sty", "base_model": "sd-1"}, "weight": 0.75}],
    "vae": {"model_name": "sd-vae-ft-mse", "base_model": "sd-1"},
}  # fmt: skip
VERSION_5 = VERSION_3 | {
    "app_version": "5.6.0", "cfg_rescale_multiplier": 0.3, "scheduler": "euler",
    "model": {"key": "1f2e", "hash": "blake3:aa", "name": "amixx_3", "base": "sd-1", "type": "main"}, "vae": None,
    "loras": [{"model": {"key": "3a", "hash": "blake3:bb", "name": "sty", "base": "sd-1", "type": "lora"}, "weight": 0.75}],
    "canvas_v2_metadata": {"regionalGuidance": []},
}  # fmt: skip
VERSION_2 = {
    "model": "stable diffusion", "model_weights": "stable-diffusion-1.5", "model_hash": "cc6cb271",
    "app_id": "invoke-ai/InvokeAI", "app_version": "2.3.5",
    "image": {
        "prompt": [{"prompt": "a fox [blurry, bad] in snow", "weight": 1}], "steps": 50, "cfg_scale": 7.5, "threshold": 0,
        "perlin": 0, "height": 512, "width": 640, "seed": 3031912972, "seamless": False, "hires_fix": False,
        "type": "txt2img", "postprocessing": None, "sampler": "k_lms", "variations": [],
    },
}  # fmt: skip


def account(said: dict[str, Any], name: str = "invokeai_metadata") -> Account:
    found = read_account({name: json.dumps(said)})
    assert found is not None
    return found


def test_version_3() -> None:
    found = account(VERSION_3)
    assert found.options == {
        "prompt": "a fox, (red)", "negative_prompt": "low quality", "prompt_syntax": "plain", "width": 768, "height": 432,
        "seed": 356120443, "guidance_scale": 7.5, "steps": 50, "sampler": "dpmpp-2m", "spacing": "karras", "clip_skip": 2,
        "noise_source": "cpu",
    }  # fmt: skip
    assert (found.model, found.model_options) == ("amixx_3", {"vae": "sd-vae-ft-mse"})
    assert found.loras == (NamedLoRA("sty", "0.75"),)
    assert {one.name for one in found.fields} == VERSION_3.keys() and not found.of("approximated", "refused")


def test_version_5() -> None:
    found = account(VERSION_5)
    assert (found.model, found.model_options, found.loras) == ("amixx_3", {}, (NamedLoRA("sty", "0.75"),))
    assert (found.options["sampler"], found.options["spacing"], found.options["guidance_rescale"]) == (
        "euler",
        None,
        0.3,
    )
    assert {one.name for one in found.fields} == VERSION_5.keys() and not found.lacking


def test_version_2() -> None:
    found = account(VERSION_2, "sd-metadata")
    assert (found.options["prompt"], found.options["negative_prompt"]) == ("a fox  in snow", "blurry, bad")
    assert (found.options["sampler"], found.options["seed"], found.options["width"]) == ("lms", 3031912972, 640)
    assert found.model == "stable-diffusion-1.5" and not found.of("refused") and not found.lacking


@pytest.mark.parametrize("text", ["a fox+", "a (red fox)1.3", "fox-- here", "a cat.swap(dog)", '("a", "b").and()'])
def test_weights_in_its_manner_are_refused_by_name(text: str) -> None:
    assert [one.name for one in account(VERSION_3 | {"positive_prompt": text}).of("refused")] == [
        "positive_prompt: weights"
    ]
    assert not account(VERSION_3 | {"positive_prompt": "well-made, x - y"}).of("refused")


@pytest.mark.parametrize(
    "more", [{"controlnets": [{"control_model": {}}]}, {"seamless_x": True}, {"hrf_enabled": True}, {"what": "ever"}]
)
def test_what_is_not_here_is_refused_by_name(more: dict[str, Any]) -> None:
    assert [one.name for one in account(VERSION_3 | more).of("refused")] == list(more)


def test_what_draws_noise_in_its_steps_is_nearly_the_same() -> None:
    assert [one.name for one in account(VERSION_3 | {"scheduler": "euler_a"}).of("approximated")] == ["scheduler"]
    assert account(VERSION_3 | {"scheduler": "deis"}).lacking


def test_image_to_image_needs_the_image() -> None:
    found = account(VERSION_3 | {"generation_mode": "img2img", "strength": 0.6, "init_image": "a.png"})
    assert (found.task, found.strength) == ("edit", 0.6)


@pytest.mark.parametrize("text", ["[]", "{", "1", '{"image": [1]}', '{"image": {"prompt": {}}}'])
def test_text_in_another_form(text: str) -> None:
    for name in ("invokeai_metadata", "sd-metadata"):
        try:
            found = read_account({name: text})
        except DataError:
            continue
        assert found is not None and found.lacking
