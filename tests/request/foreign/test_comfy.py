"""Graphs in the exact form of ComfyUI's `prompt` text."""

from __future__ import annotations

import json
import time
from copy import deepcopy
from typing import Any

import pytest

from latentdiff.errors import DataError
from latentdiff.request.foreign import read_account
from latentdiff.request.foreign.account import Account, NamedLoRA

# The default workflow of ComfyUI as its server writes it into images.
DEFAULT: dict[str, Any] = {
    "3": {
        "inputs": {
            "seed": 156680208700286, "steps": 20, "cfg": 8.0, "sampler_name": "euler", "scheduler": "normal",
            "denoise": 1.0, "model": ["4", 0], "positive": ["6", 0], "negative": ["7", 0], "latent_image": ["5", 0],
        },
        "class_type": "KSampler", "_meta": {"title": "KSampler"},
    },
    "4": {"inputs": {"ckpt_name": "v1-5-pruned-emaonly.ckpt"}, "class_type": "CheckpointLoaderSimple"},
    "5": {"inputs": {"width": 512, "height": 768, "batch_size": 1}, "class_type": "EmptyLatentImage"},
    "6": {"inputs": {"text": "(purple:1.1) galaxy, \"bottle\":\n(w)", "clip": ["4", 1]}, "class_type": "CLIPTextEncode"},
    "7": {"inputs": {"text": "text, watermark", "clip": ["4", 1]}, "class_type": "CLIPTextEncode"},
    "8": {"inputs": {"samples": ["3", 0], "vae": ["4", 2]}, "class_type": "VAEDecode"},
    "9": {"inputs": {"filename_prefix": "ComfyUI", "images": ["8", 0]}, "class_type": "SaveImage"},
}  # fmt: skip


def account(graph: Any) -> Account:
    found = read_account({"prompt": json.dumps(graph), "workflow": '{"nodes": []}'})
    assert found is not None
    return found


def changed(nodes: dict[str, Any] | None = None, **inputs: Any) -> dict[str, Any]:
    """The default workflow with more or other nodes, and other inputs of its sampler."""
    graph = deepcopy(DEFAULT) | (nodes or {})
    graph["3"]["inputs"] |= inputs
    return graph


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}


def test_the_default_workflow() -> None:
    found = account(DEFAULT)
    assert found.options == {
        "prompt": '(purple:1.1) galaxy, "bottle":\n(w)', "negative_prompt": "text, watermark", "prompt_syntax": "comfy",
        "seed": 156680208700286, "steps": 20, "guidance_scale": 8.0, "sampler": "euler", "discard_penultimate": False,
        "spacing": "normal", "width": 512, "height": 768, "noise_source": "comfy", "noise_start": "unit",
        "told_timesteps": "whole",
    }  # fmt: skip
    assert found.model == "v1-5-pruned-emaonly.ckpt" and not found.lacking
    assert not found.of("approximated", "refused")


@pytest.mark.parametrize(
    ("name", "schedule", "expected"),
    [
        ("euler_ancestral", "karras", ("euler-a", "karras", False)),
        ("dpm_2", "simple", ("dpm2", "simple", True)),
        ("dpmpp_2m", "beta", ("dpmpp-2m", "beta-comfy", False)),
        ("ddim", "ddim_uniform", ("euler", "ddim-uniform", False)),
        ("lms", "sgm_uniform", ("lms", "sgm-uniform", False)),
        ("heun", "kl_optimal", ("heun", "kl-optimal-comfy", False)),
        ("dpm_2_ancestral", "exponential", ("dpm2-a", "exponential", True)),
    ],
)
def test_samplers_and_schedules(name: str, schedule: str, expected: tuple[str, str, bool]) -> None:
    found = account(changed(sampler_name=name, scheduler=schedule)).options
    assert (found["sampler"], found["spacing"], found["discard_penultimate"]) == expected


@pytest.mark.parametrize("name", ["dpmpp_sde_gpu", "dpmpp_2m_sde", "dpmpp_3m_sde", "uni_pc", "lcm"])
def test_samplers_that_are_nearly_the_same(name: str) -> None:
    assert [one.name for one in account(changed(sampler_name=name)).of("approximated")] == ["sampler_name"]


def test_linked_prompts_adapters_and_layers() -> None:
    graph = changed(
        {
            "6": node("CLIPTextEncode", text=["20", 0], clip=["13", 0]),
            "7": node("CLIPTextEncode", text="", clip=["13", 0]),
            "10": node(
                "LoraLoader",
                lora_name="a.safetensors",
                strength_model=0.8,
                strength_clip=0.5,
                model=["4", 0],
                clip=["4", 1],
            ),
            "11": node("LoraLoaderModelOnly", lora_name="sub/b.safetensors", strength_model=1.0, model=["10", 0]),
            "12": node("ModelSamplingDiscrete", sampling="v_prediction", zsnr=True, model=["11", 0]),
            "13": node("CLIPSetLastLayer", stop_at_clip_layer=-2, clip=["10", 1]),
            "14": node("VAELoader", vae_name="vae.safetensors"),
            "8": node("VAEDecode", samples=["3", 0], vae=["14", 0]),
            "20": node("Reroute", value=["21", 0]),
            "21": node("PrimitiveStringMultiline", value="a (cat)"),
            "30": node("PreviewAny", source=["21", 0]),
        },
        model=["12", 0],
        seed=["22", 0],
    ) | {"22": node("PrimitiveInt", value=7)}
    found = account(graph)
    assert found.loras == (NamedLoRA("a.safetensors", "unet=0.8,te=0.5"), NamedLoRA("sub/b.safetensors", "unet=1,te=0"))
    assert found.model_options == {
        "prediction_type": "v_prediction",
        "zero_terminal_snr": True,
        "vae": "vae.safetensors",
    }
    assert (found.options["prompt"], found.options["negative_prompt"]) == ("a (cat)", "")
    assert (found.options["clip_skip"], found.options["seed"]) == (2, 7)
    assert not found.of("approximated", "refused") and not found.lacking
    assert ("PreviewAny (30)", "does not lead to the image") in [(one.name, one.why) for one in found.fields]


def advanced(**inputs: Any) -> dict[str, Any]:
    own = {name: value for name, value in DEFAULT["3"]["inputs"].items() if name not in ("seed", "denoise")}
    whole = {"add_noise": "enable", "noise_seed": 5, "start_at_step": 0, "end_at_step": 10000}
    return deepcopy(DEFAULT) | {
        "3": node("KSamplerAdvanced", **(own | whole | {"return_with_leftover_noise": "disable"} | inputs))
    }


def test_the_advanced_sampler_is_honoured_where_it_walks_all_the_way() -> None:
    found = account(advanced())
    assert found.options["seed"] == 5 and not found.of("refused") and not found.lacking
    for name, value in [("start_at_step", 5), ("end_at_step", 12), ("add_noise", "disable")]:
        assert [one.name for one in account(advanced(**{name: value})).of("refused")] == [name]


def test_the_place_in_a_batch() -> None:
    batch = {"5": node("EmptyLatentImage", width=512, height=512, batch_size=4)}
    (one,) = account(changed(batch)).of("approximated")
    assert one.name == "batch_size" and "--noise-index 0 to 3" in one.why
    one_of_it = {"40": node("LatentFromBatch", samples=["5", 0], batch_index=2, length=1)}
    found = account(changed(batch | one_of_it, latent_image=["40", 0]))
    assert found.options["noise_index"] == 2 and not found.of("approximated", "refused")


def test_a_file_is_taken_for_what_was_saved_and_not_for_a_preview() -> None:
    first = {"80": node("PreviewImage", images=["81", 0]), "81": node("VAEDecode", samples=["82", 0]), "82": DEFAULT["3"]}
    found = account(changed(first, seed=99))
    (one,) = found.of("approximated")
    assert found.options["seed"] == 99 and one.name == "PreviewImage (80)" and "SaveImage (9)" in one.why


def test_image_to_image_needs_the_image() -> None:
    image = {"5": node("VAEEncode", pixels=["41", 0], vae=["4", 2]), "41": node("LoadImage", image="photo.png")}
    found = account(changed(image, denoise=0.5))
    assert (found.task, found.strength, found.options["steps"]) == ("edit", 0.5, 40)
    assert "photo.png" in [one.value for one in found.of("approximated")] and not found.lacking
    masked = {"42": node("SetLatentNoiseMask", samples=["5", 0], mask=["41", 1])}
    assert account(changed(image | masked, denoise=0.5, latent_image=["42", 0])).task == "inpaint"


@pytest.mark.parametrize(
    ("nodes", "inputs", "named"),
    [
        ({"50": node("ControlNetApply", conditioning=["6", 0], control_net=["51", 0], image=["52", 0], strength=1.0)},
         {"positive": ["50", 0]}, "ControlNetApply"),
        ({"50": node("ConditioningCombine", conditioning_1=["6", 0], conditioning_2=["7", 0])},
         {"positive": ["50", 0]}, "ConditioningCombine"),
        ({"50": node("FreeU_V2", model=["4", 0], b1=1.3, b2=1.4, s1=0.9, s2=0.2)}, {"model": ["50", 0]}, "FreeU_V2"),
        ({"8": node("ImageUpscaleWithModel", upscale_model=["51", 0], image=["53", 0]),
          "53": node("VAEDecode", samples=["3", 0], vae=["4", 2])}, {}, "ImageUpscaleWithModel"),
    ],
)  # fmt: skip
def test_nodes_that_are_not_here_are_refused_by_name(nodes: dict[str, Any], inputs: dict[str, Any], named: str) -> None:
    found = account(changed(nodes, **inputs))
    assert any(named in one.name for one in found.of("refused")) and not found.lacking


@pytest.mark.parametrize(
    ("graph", "lacks"),
    [
        (changed(sampler_name="res_multistep"), "sampler_name"),
        (changed(scheduler="linear_quadratic"), "scheduler"),
        (changed({"6": node("CLIPTextEncode", text=["60", 0], clip=["4", 1]), "60": node("LLM", seed=1)}), "positive"),
        (changed({"5": node("LatentUpscaleBy", samples=["61", 0], scale_by=2.0)}, denoise=0.5), "latent_image"),
        (changed(steps=["60", 0]), "steps"),
        (changed(seed=None), "seed"),
        (changed(cfg="much"), "cfg"),
    ],
)
def test_without_these_there_is_no_image(graph: Any, lacks: str) -> None:
    assert [reason.split(":")[0] for reason in account(graph).lacking] == [lacks]


def cycle() -> dict[str, Any]:
    return changed({"70": node("FreeU", model=["71", 0]), "71": node("FreeU", model=["70", 0])}, model=["70", 0])


@pytest.mark.parametrize(
    ("graph", "message"),
    [
        (cycle(), "goes round in a circle"),
        (changed({"6": node("Reroute", value=["6", 0])}), "goes round in a circle"),
        (changed({"8": node("VAEDecode", samples=["8", 0])}), "goes round in a circle"),
        ({}, "expected a graph"), ({"3": []}, "no class_type"), ({"3": {"inputs": {}}}, "no class_type"),
        ({"1": node("SaveImage", images=["2", 0]), "2": node("SamplerCustomAdvanced")}, "found SamplerCustomAdvanced"),
        (changed({"80": node("SaveImage", images=["81", 0]), "81": node("VAEDecode", samples=["82", 0]),
                  "82": DEFAULT["3"]}), "makes several images"),
        ({str(number): node("X") for number in range(10_001)}, "10,000 nodes"),
    ],
)  # fmt: skip
def test_graphs_that_cannot_be_read(graph: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        account(graph)


@pytest.mark.parametrize("text", ['{"3": ', "{" * 5000, "{" + "x" * 1_000_000, '{"a": ' * 70 + "1" + "}" * 70])
def test_text_that_is_no_json(text: str) -> None:
    with pytest.raises(DataError):
        read_account({"prompt": text})
    with pytest.raises(DataError, match="letters"):
        read_account({"prompt": "{" * 4_000_001})


def test_long_chains_are_followed_in_proportion_to_their_length() -> None:
    chain = {str(100 + i): node("FreeU", model=[str(101 + i), 0]) for i in range(9000)}
    chain["9100"] = DEFAULT["4"]
    start = time.process_time()
    found = account(changed(chain, model=["100", 0]))
    assert len(found.of("refused")) == 9000 and time.process_time() - start < 3.0
