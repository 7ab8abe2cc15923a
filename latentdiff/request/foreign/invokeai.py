"""The metadata of InvokeAI: `invokeai_metadata` since version 3, `sd-metadata` before."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, cast

from latentdiff.request.foreign.account import Account, Draft, number_of

# Its names of diffusers' schedulers; "_k" at the end is Karras.
SCHEDULERS = {
    "ddim": "ddim", "ddpm": "ddpm", "euler": "euler", "euler_a": "euler-a", "heun": "heun", "lms": "lms",
    "pndm": "pndm", "plms": "pndm", "kdpm_2": "dpm2", "kdpm_2_a": "dpm2-a", "dpmpp_2s": "dpmpp-2s",
    "dpmpp_2m": "dpmpp-2m", "dpmpp_2m_sde": "dpmpp-2m-sde", "dpmpp_sde": "dpmpp-sde", "unipc": "unipc", "lcm": "lcm",
    "tcd": "tcd",
}  # fmt: skip
# Version 2 wrote those of k-diffusion, on Karras' levels or not as the steps were.
OLD_SCHEDULERS = {f"k_{name}": name for name in ("euler", "euler_a", "heun", "lms")} | {
    "k_dpm_2": "kdpm_2", "k_dpm_2_a": "kdpm_2_a", "k_dpmpp_2": "dpmpp_2m", "k_dpmpp_2_a": "dpmpp_2s",
}  # fmt: skip
_DRAWS = ("ddpm", "euler-a", "dpm2-a", "dpmpp-2m-sde", "dpmpp-sde", "lcm", "tcd")
_COMPEL = re.compile(r"[\w)][+-]+(?=[\s,.)]|$)|\)[0-9.]+|\.(?:swap|and|blend)\(|<[^<>]+>")
NEEDED = {"prompt": "positive_prompt", "seed": "seed", "steps": "steps", "sampler": "scheduler", "width": "width"}

_NOTHING = ("app_version", "rand_device", "_canvas_objects", "canvas_v2_metadata", "metadata_version", "app_id",
            "model_weights", "postprocessing", "generation_mode")  # fmt: skip


def read(said: dict[str, Any]) -> Account:
    """The account of `invokeai_metadata`."""
    draft = Draft(f"InvokeAI {said.get('app_version', '')}".strip(), prompt_syntax="plain", noise_source="cpu")
    for name, value in said.items():
        if name in _READ:
            _READ[name](draft, name, value)
        elif name in _NOTHING or value in (None, False, [], {}, ""):
            draft.honour(name, value, "changes nothing in the image")
        else:
            draft.refuse(name, value, "is not known here")
    mode = said.get("generation_mode", "txt2img")
    if mode != "txt2img":
        draft.task = "inpaint" if "paint" in str(mode) else "edit"
        strength = said.get("strength")
        draft.strength = float(strength) if isinstance(strength, int | float) else None
        draft.approximate("generation_mode", mode, "made from another image, which the command names")
    draft.require(NEEDED)
    return draft.account()


def read_old(said: dict[str, Any]) -> Account:
    """The account of `sd-metadata`, by the names of today; its prompt has what to avoid in square brackets."""
    image = said.get("image")
    image = cast(dict[str, Any], image) if isinstance(image, dict) else {}
    prompts = image.get("prompt")
    first = cast(list[Any], prompts)[0] if isinstance(prompts, list) and prompts else prompts
    text = cast(dict[str, Any], first).get("prompt") if isinstance(first, dict) else first
    text = text if isinstance(text, str) else ""
    avoided = re.findall(r"\[([^\[\]]*)\]", text)
    today: dict[str, Any] = {
        "app_version": said.get("app_version", ""),
        "positive_prompt": re.sub(r"\[[^\[\]]*\]", "", text).strip(),
        "negative_prompt": " ".join(avoided),
        "model": said.get("model_weights", said.get("model", "")),
    }
    same = {"type": "generation_mode", "sampler": "scheduler"}
    today |= {same.get(name, name): value for name, value in image.items() if name != "prompt"}
    if isinstance(prompts, list) and len(cast(list[Any], prompts)) > 1:
        today["several prompts"] = prompts
    name = str(today.get("scheduler", ""))
    today["scheduler"] = OLD_SCHEDULERS.get(name, name)
    return read(today)


def _prompt(option: str) -> Callable[[Draft, str, Any], None]:
    def say(draft: Draft, name: str, value: Any) -> None:
        text = value if isinstance(value, str) else ""
        if found := _COMPEL.search(text):
            why = f"weights in InvokeAI's manner ({found[0]!r}) are letters here; write them as (word:1.1)"
            draft.refuse(f"{name}: weights", found[0], why)
        draft.honour(name, text, **{option: text})

    return say


def _scheduler(draft: Draft, name: str, value: Any) -> None:
    title = str(value)
    base, spacing = (title[:-2], "karras") if title.endswith("_k") else (title, None)
    if base not in SCHEDULERS:
        draft.lack(name, title, "there is no such sampler here")
    elif SCHEDULERS[base] in _DRAWS:
        why = "the noise of its steps is drawn otherwise there"
        draft.approximate(name, title, why, sampler=SCHEDULERS[base], spacing=spacing)
    else:
        draft.honour(name, title, f"{SCHEDULERS[base]}, {spacing or 'spacing of the model'}",
                     sampler=SCHEDULERS[base], spacing=spacing)  # fmt: skip


def _model(draft: Draft, name: str, value: Any) -> None:
    draft.model = _name(value)
    draft.honour(name, draft.model, "name its file with --model")


def _vae(draft: Draft, name: str, value: Any) -> None:
    if not value:
        draft.honour(name, value, "the model's own")
        return
    draft.model_options["vae"] = _name(value)
    draft.honour(name, draft.model_options["vae"], "name its file with --vae")


def _loras(draft: Draft, name: str, value: Any) -> None:
    for entry in cast(list[Any], value) if isinstance(value, list) else []:
        found = cast(dict[str, Any], entry) if isinstance(entry, dict) else {}
        file, weight = _name(found.get("lora", found.get("model"))), found.get("weight")
        draft.attach(name, f"{file}: {weight}", file, weight, weight)
    if not value:
        draft.honour(name, value, "none")


def _clip_skip(draft: Draft, name: str, value: Any) -> None:
    if isinstance(value, int) and value >= 0:
        draft.honour(name, value, "counted from 0 there", clip_skip=value + 1)
    else:
        draft.refuse(name, value, "expected a whole number of 0 or more")


def _name(value: Any) -> str:
    """Of a model, which versions wrote in several ways."""
    if isinstance(value, dict):
        found = cast(dict[str, Any], value)
        return str(found.get("name") or found.get("model_name") or "")
    return value if isinstance(value, str) else ""


_READ: dict[str, Callable[[Draft, str, Any], None]] = {
    "positive_prompt": _prompt("prompt"),
    "negative_prompt": _prompt("negative_prompt"),
    "width": number_of("width", int),
    "height": number_of("height", int),
    "seed": number_of("seed", int),
    "steps": number_of("steps", int),
    "cfg_scale": number_of("guidance_scale", float),
    "cfg_rescale_multiplier": number_of("guidance_rescale", float),
    "scheduler": _scheduler,
    "model": _model,
    "vae": _vae,
    "loras": _loras,
    "clip_skip": _clip_skip,
}
