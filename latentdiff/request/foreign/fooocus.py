"""The metadata of Fooocus: JSON (its scheme "fooocus"), or a text in the manner of AUTOMATIC1111 (its scheme "a1111").

Fooocus draws with Stable Diffusion XL by ComfyUI's code, and changes the model on the way (sharpness, ADM guidance).
"""

from __future__ import annotations

import math
import re
from typing import Any, cast

from latentdiff.request.foreign import comfy
from latentdiff.request.foreign.account import Account, Draft
from latentdiff.request.infotext import TITLES, InfoText

NEEDED = {"prompt": "prompt", "seed": "seed", "steps": "steps", "sampler": "sampler", "width": "resolution"}
# The names of its JSON for those of its text.
TEXT_NAMES = {
    "Steps": "steps", "Sampler": "sampler", "Scheduler": "scheduler", "Seed": "seed", "Size": "resolution",
    "CFG scale": "guidance_scale", "Model": "base_model", "Model hash": "base_model_hash", "VAE": "vae",
    "Styles": "styles", "Performance": "performance", "Sharpness": "sharpness", "ADM Guidance": "adm_guidance",
    "Refiner": "refiner_model", "Refiner hash": "refiner_model_hash", "Refiner Switch": "refiner_switch",
    "Refiner Swap Method": "refiner_swap_method", "Adaptive CFG": "adaptive_cfg", "FreeU": "freeu",
    "Overwrite Switch": "overwrite_switch", "Clip skip": "clip_skip", "CLIP Skip": "clip_skip", "Version": "version",
    "User": "created_by", "Raw prompt": "raw_prompt", "Raw negative prompt": "raw_negative_prompt",
    "Lora hashes": "lora_hashes", "Lora weights": "lora_weights", "Inpaint Engine Version": "inpaint_engine_version",
}  # fmt: skip
_TITLES = {named.sampler: title for title, named in TITLES.items()}
_NOTHING = ("performance", "version", "created_by", "metadata_scheme", "base_model_hash", "refiner_model_hash",
            "lora_hashes", "image_number", "raw_prompt", "raw_negative_prompt", "prompt_expansion")  # fmt: skip
_WITHOUT = {
    "sharpness": "guidance is not sharpened here",
    "adm_guidance": "belongs to Stable Diffusion XL",
    "adaptive_cfg": "guidance is one number here",
    "refiner_model": "there is no second model for the last steps here",
    "refiner_switch": "there is no second model for the last steps here",
    "freeu": "there is no FreeU here",
}
_OFF = (None, "", "None", "[]", [])


def is_text(text: InfoText, scheme: str) -> bool:
    """Whether a text of settings is Fooocus', which leaves out what AUTOMATIC1111 says and the other way round."""
    return scheme == "a1111" or text.settings.get("Version", "").startswith("Fooocus")


def read_text(text: InfoText) -> Account:
    """The account of its text, which holds the prompts with their styles."""
    said: dict[str, Any] = {TEXT_NAMES.get(name, name): value for name, value in text.settings.items()}
    said |= {f"{name} (after the settings)": value for name, value in text.behind.items()}
    title = str(said.get("sampler", "")).removesuffix(" Karras")
    said["sampler"] = _comfy_name(title)
    return read({"full_prompt": [text.prompt], "full_negative_prompt": [text.negative], **said})


def read(said: dict[str, Any]) -> Account:
    """The account of its JSON."""
    draft = Draft(str(said.get("version", "Fooocus"))[:64], prompt_syntax="comfy", noise_source="comfy",
                  noise_start="unit", told_timesteps="whole")  # fmt: skip
    draft.refuse("(model)", "Stable Diffusion XL", "Fooocus changes it on the way, by sharpness and ADM guidance")
    _prompts(draft, said)
    for name, value in said.items():
        _field(draft, name, value, said)
    draft.require(NEEDED)
    return draft.account()


def _prompts(draft: Draft, said: dict[str, Any]) -> None:
    """The full prompts, with styles and expansion, where they are said."""
    for name, option in (("prompt", "prompt"), ("negative_prompt", "negative_prompt")):
        full, raw = said.get(f"full_{name}"), said.get(name)
        parts = [str(part) for part in cast(list[Any], full)] if isinstance(full, list) else []
        if len(parts) == 1:
            draft.honour(f"full_{name}", parts[0], **{option: parts[0]})
        elif parts:
            why = "embeddings of its lines are joined there, here they are one prompt"
            text = ", ".join(part for part in parts if part)
            draft.approximate(f"full_{name}", text, why, **{option: text})
        elif isinstance(raw, str):
            draft.honour(name, raw, **{option: raw})


def _field(draft: Draft, name: str, value: Any, said: dict[str, Any]) -> None:
    if name in ("prompt", "negative_prompt", "full_prompt", "full_negative_prompt"):
        return
    if name in ("seed", "steps"):
        draft.number(name, value, name, int)
    elif name == "guidance_scale":
        draft.number(name, value, name)
    elif name == "clip_skip":
        draft.number(name, value, name, int)
    elif name == "sampler":
        _sampler(draft, value)
    elif name == "scheduler":
        spacing = comfy.SCHEDULES.get(str(value))
        if spacing:
            draft.honour(name, value, spacing, spacing=spacing)
        else:
            draft.lack(name, value, "there is no such schedule here")
    elif name == "resolution":
        _resolution(draft, value)
    elif name == "base_model":
        draft.model = str(value)
        draft.honour(name, value, "name its file with --model")
    elif name == "vae":
        if value not in (*_OFF, "Default (model)"):
            draft.model_options["vae"] = str(value)
        draft.honour(name, value, "name its file with --vae" if "vae" in draft.model_options else "the model's own")
    elif name == "styles":
        _styles(draft, value)
    elif name in ("loras", "lora_weights") or name.startswith("lora_combined_"):
        _loras(draft, name, value)
    elif name == "lora_hashes" and "lora_weights" not in said and str(value).count(":") > 1:
        _loras(draft, name, value)  # as older versions have the weights
    elif name in _NOTHING or value in _OFF:
        draft.honour(name, value, "changes nothing in the image")
    else:
        draft.refuse(name, value, _WITHOUT.get(name, "is not known here"))


def _sampler(draft: Draft, value: Any) -> None:
    found = comfy.SAMPLERS.get(str(value))
    if found is None:
        draft.lack("sampler", value, "there is no such sampler here")
    elif "sde" in found or found == "unipc":
        draft.approximate("sampler", value, "its noise or its order is another here", sampler=found)
    else:
        draft.honour("sampler", value, found, sampler=found)


def _comfy_name(title: str) -> str:
    """ComfyUI's name of a sampler that the text calls by its title; some it calls by that name already."""
    names = (name for name, own in comfy.SAMPLERS.items() if _TITLES[own] == title and name != "ddim")
    return "ddim" if title == "DDIM" else next(names, title)


def _resolution(draft: Draft, value: Any) -> None:
    sides = re.findall(r"\d{1,6}", str(value))
    if len(sides) != 2:
        draft.lack("resolution", value, "expected two numbers")
        return
    draft.honour("resolution", value, width=int(sides[0]), height=int(sides[1]))


def _styles(draft: Draft, value: Any) -> None:
    is_said = any(name.startswith("full_") for name in (one.name for one in draft.fields))
    if value in _OFF or is_said:
        draft.honour("styles", value, "they are in the full prompts")
    else:
        draft.refuse("styles", value, "what they add to the prompts is not said")


def _loras(draft: Draft, name: str, value: Any) -> None:
    """Lists of name and weight, or texts "name : weight", "True : name : weight", "name: hash: weight, ..."."""
    entries: list[Any] = cast(list[Any], value) if isinstance(value, list) else str(value).split(", ")
    for entry in entries:
        parts = cast(list[Any], entry) if isinstance(entry, list) else str(entry).split(":")
        parts = [str(part).strip() for part in parts]
        if parts[:1] == ["False"] or "None" in parts:
            draft.honour(name, entry, "off")
            continue
        parts = parts[1:] if parts[:1] == ["True"] else parts
        try:
            strength = float(parts[-1])
        except (ValueError, IndexError):
            strength = math.nan
        draft.attach(name, entry, parts[0] if parts else "", strength, strength)
