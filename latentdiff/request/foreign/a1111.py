"""The text of AUTOMATIC1111's web UI, Forge and their kin.

What it leaves unsaid means what these programs take it for: Clip skip 1, RNG GPU, Schedule type Automatic. Before
version 1.9 the schedule was a suffix of the sampler's name, and no suffix meant Uniform.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping

from latentdiff.errors import DataError
from latentdiff.request.foreign.account import Account, Draft, number_of
from latentdiff.request.foreign.hires import hires_handlers
from latentdiff.request.infotext import AUTOMATIC, SCHEDULES, TITLES, WITHOUT_SCHEDULE, InfoText, read_sampler

NEEDED = {"steps": "Steps", "sampler": "Sampler", "guidance_scale": "CFG scale", "seed": "Seed", "width": "Size"}
PATHS = ("dpmpp-sde", "dpmpp-2m-sde", "dpmpp-3m-sde")  # whose noise is a Brownian path of k-diffusion there
# Elements of latents for which every GPU in use has a thread, so that all draw the same.
ANY_GPU = 40_000
_LORA_DIGITS = 12  # of the hash of a LoRA
_NOT_SAID = " (not said)"
_SHA256_DIGITS = 10  # of a hash in texts since 2023
_VERSION = re.compile(r"(?:^|v)(\d{1,3})\.(\d{1,3})")

Handler = Callable[[Draft, str, str], None]


def read(text: InfoText, program: str = "AUTOMATIC1111 or Forge") -> Account:
    """The account of a text that has settings."""
    settings = text.settings
    version = settings.get("Version", "")
    draft = Draft(f"{program} {version}".strip(), prompt_syntax="a1111", noise_start="sigma", told_timesteps="exact")
    _prompts(draft, text)
    hires = hires_handlers(settings)
    for name, value in settings.items():
        if name in hires:
            hires[name](draft, name, value)
        elif name not in _TOGETHER:
            _handler(name)(draft, name, value)
        elif name == "Sampler":
            _method(draft, settings, _version(version))
        elif name == "Denoising strength":
            _strength(draft, settings)
        elif "Sampler" not in settings:
            draft.refuse(name, value, "the text names no sampler for it")
    for name, value in text.behind.items():
        draft.honour(name or "(after the settings)", value, "stands behind the settings; changes nothing in the image")
    for name, value in _SILENCE.items():
        if name not in settings:
            SETTINGS[name](draft, f"{name}{_NOT_SAID}", value)
    if "noise_source" in draft.options and draft.options.get("sampler") in PATHS:
        draft.approximate("(noise of the steps)", "", "a Brownian path of k-diffusion there, one of ours here")
    draft.require(NEEDED)
    return draft.account()


def _prompts(draft: Draft, text: InfoText) -> None:
    draft.honour("Prompt", text.prompt, prompt=text.prompt)
    if text.negative:
        draft.honour("Negative prompt", text.negative, negative_prompt=text.negative)
    version = _version(text.settings.get("Version", ""))
    brackets = re.findall(r"\[[^\[\]]*\]", text.prompt + text.negative)
    if version and version < (1, 6) and any(":" in one for one in brackets):
        draft.approximate("(prompt editing)", "", "before 1.6 steps were counted otherwise in [a:b:n]")


def _method(draft: Draft, settings: Mapping[str, str], version: tuple[int, int] | None) -> None:
    """Sampler and schedule, which mean something only together."""
    title, schedule = settings["Sampler"], settings.get("Schedule type")
    try:
        named = read_sampler(title, schedule)
    except DataError as error:
        is_schedule = title in TITLES
        draft.lack(*(("Schedule type", schedule) if is_schedule else ("Sampler", title)), str(error))
        if is_schedule or schedule:
            other = ("Sampler", title) if is_schedule else ("Schedule type", schedule)
            draft.refuse(*other, "without the other it has no meaning")
        return
    options = {"sampler": named.sampler, "spacing": named.spacing, "discard_penultimate": named.discard_penultimate}
    has_suffix = any(title.endswith(f" {suffix}") for suffix in SCHEDULES)
    is_silent = schedule is None and not has_suffix and title not in WITHOUT_SCHEDULE
    if title in WITHOUT_SCHEDULE:
        draft.options["noise_start"] = "unit"
    steps = settings.get("Steps", "")
    if title in _NEARLY and not (title == "DDIM" and steps in _EVEN_STEPS):
        draft.approximate("Sampler", title, _NEARLY[title], **options)
    else:
        draft.honour("Sampler", title, f"{named.sampler}, {named.spacing}", **options)
    if schedule is not None:
        why = "its noise levels are its own" if title in WITHOUT_SCHEDULE else named.spacing
        draft.honour("Schedule type", schedule, why)
    elif is_silent and version and version < (1, 9):
        draft.honour(f"Schedule type{_NOT_SAID}", "Uniform", "what no suffix meant before 1.9", spacing="normal")
    elif is_silent and not version and named.spacing != "normal":
        why = f"{named.spacing}; if the text is from before 1.9, it means --spacing normal"
        draft.approximate(f"Schedule type{_NOT_SAID}", AUTOMATIC, why)
    elif is_silent:
        draft.honour(f"Schedule type{_NOT_SAID}", AUTOMATIC, named.spacing)


def _strength(draft: Draft, settings: Mapping[str, str]) -> None:
    """Of image to image; of a text with hires fields it belongs to these."""
    value = settings["Denoising strength"]
    if any(name.startswith("Hires ") or name.startswith("First pass") for name in settings):
        draft.refuse("Denoising strength", value, "of the hires pass")
        return
    try:
        strength, steps = min(float(value), 0.999), int(settings["Steps"])
        taken = int(strength * steps) + 1
        share = taken / steps
    except (KeyError, ValueError, OverflowError, ZeroDivisionError):
        draft.lack("Denoising strength", value, "it is no number, or Steps is none")
        return
    is_masked = any(name in settings for name in ("Mask blur", "Mask mode", "Inpaint area", "Masked content"))
    draft.task = "inpaint" if is_masked else "edit"
    draft.strength = share if int(steps * share) == taken else math.nextafter(share, 2.0)
    masked = " and a mask" if is_masked else ""
    draft.approximate(
        "Denoising strength", value,
        f"made from another image{masked}, which the command names; the same {taken} steps, other noise in encoding it",
    )  # fmt: skip


def _size(draft: Draft, name: str, value: str) -> None:
    sides = re.fullmatch(r"(\d{1,6})x(\d{1,6})", value)
    if sides is None:
        draft.lack(name, value, "expected WIDTHxHEIGHT")
        return
    draft.honour(name, value, width=int(sides[1]), height=int(sides[2]))


def _rng(draft: Draft, name: str, value: str) -> None:
    if value == "CPU":
        draft.honour(name, value, noise_source="cpu")
    elif value == "NV":
        draft.honour(name, value, noise_source="nv")
    elif value == "GPU":
        elements = draft.options.get("width", 0) * draft.options.get("height", 0) // 16
        if elements > ANY_GPU:
            why = "as an NVIDIA GPU with a thread for every number draws it; at this size smaller ones draw otherwise"
            draft.approximate(name, value, why, noise_source="nv")
        else:
            draft.honour(name, value, "as an NVIDIA GPU draws it", noise_source="nv")
    else:
        draft.refuse(name, value, "expected CPU, GPU or NV; drawn as here, on the CPU")


def _unit_start(draft: Draft, name: str, value: str) -> None:
    draft.honour(name, value, noise_start="unit" if value == "True" else "sigma")


def _model(draft: Draft, name: str, value: str) -> None:
    draft.model = value
    draft.honour(name, value, "name its file with --model")


def _model_hash(draft: Draft, name: str, value: str) -> None:
    if len(value) < _SHA256_DIGITS:
        draft.honour(name, value, "of the kind before 2023, of a part of the file; it is not compared")
        return
    draft.model_hash = value.lower()
    draft.honour(name, value, "first digits of the file's SHA-256, which are compared")


def _vae(draft: Draft, name: str, value: str) -> None:
    if value in ("None", "Automatic"):
        draft.honour(name, value)
        return
    draft.model_options["vae"] = value
    draft.honour(name, value, "name its file with --vae")


def _lora_hashes(draft: Draft, name: str, value: str) -> None:
    pairs = (entry.rpartition(":") for entry in value.split(","))
    found = {file.strip(): digits.strip().lower() for file, _, digits in pairs}
    draft.lora_hashes |= {file: digits for file, digits in found.items() if len(digits) >= _LORA_DIGITS}
    draft.honour(name, value, "the files are found by their names in --lora-dir; reproduce compares the hashes")


def _emphasis(draft: Draft, name: str, value: str) -> None:
    if value == "Original":
        draft.honour(name, value)
    elif value == "None":
        draft.approximate(name, value, "brackets are letters, and a prompt is cut at a chunk", prompt_syntax="plain")
    else:
        draft.refuse(name, value, "weights act as in Original here")


def _seed_resize(draft: Draft, name: str, value: str) -> None:
    if re.match(r"(-1|0)x", value):
        draft.honour(name, value, "off")
    else:
        draft.refuse(name, value, "noise of another size is not put in the middle here")


def _tiling(draft: Draft, name: str, value: str) -> None:
    if value == "False":
        draft.honour(name, value)
    else:
        draft.honour(name, value, seamless="xy")


def _without(why: str) -> Handler:
    return lambda draft, name, value: draft.refuse(name, value, why)


def _told(why: str) -> Handler:
    return lambda draft, name, value: draft.honour(name, value, why)


_NOTHING = _told("changes nothing in the image")
_HIRES = _without("there is no second pass of such a size here; the command makes the first")
_MASK = _without("inpainting here paints the mask at the image's own size, without such settings")
_VARIATION = _without("there are no variation seeds here")
_REFINER = _without("there is no second model for the last steps here")
_HASHES = _told("the files are found by their names, --lora-dir and --embedding; these hashes are not compared")
_MERGING = _without("no tokens are merged here")

SETTINGS: dict[str, Handler] = {
    "Steps": number_of("steps", int),
    "CFG scale": number_of("guidance_scale"),
    "Seed": number_of("seed", int),
    "Size": _size,
    "Model": _model,
    "Model hash": _model_hash,
    "VAE": _vae,
    "Clip skip": number_of("clip_skip", int),
    "RNG": _rng,
    "ENSD": number_of("seed_delta", int),
    "SGM noise multiplier": _unit_start,
    "Eta": number_of("eta"),
    "Eta DDIM": number_of("eta"),
    "Sigma churn": number_of("s_churn"),
    "Sigma tmin": number_of("s_tmin"),
    "Sigma tmax": number_of("s_tmax"),
    "Sigma noise": number_of("s_noise"),
    "Schedule rho": number_of("rho"),
    "Discard penultimate sigma": lambda draft, name, value: draft.honour(
        name, value, discard_penultimate=value == "True"
    ),
    "Emphasis": _emphasis,
    "Seed resize from": _seed_resize,
    "Tiling": _tiling,
    "Lora hashes": _lora_hashes,
    "TI hashes": _HASHES,
    "Hashes": _HASHES,
    **dict.fromkeys(
        ("Version", "User", "VAE hash", "Template", "Negative Template", "Wildcard prompt", "Batch size", "Batch pos",
         "Created Date", "Civitai resources", "Civitai metadata", "Init image hash", "Schedule type", "App", "Backend",
         "Time", "Face restoration model", "Pad conds"), _NOTHING,
    ),
    "Variation seed": _VARIATION,
    "Variation seed strength": _VARIATION,
    "Refiner": _REFINER,
    "Refiner switch at": _REFINER,
    "Token merging ratio": _MERGING,
    "Token merging ratio hr": _MERGING,
    "Mask blur": _MASK, "Mask mode": _MASK, "Masked content": _MASK, "Inpaint area": _MASK, "Masked area padding": _MASK,
    "Face restoration": _without("faces are not painted over here"),
    "Image CFG scale": _without("give --image-guidance-scale to a model that follows instructions"),
    "NGMS": _without("the negative prompt acts at all noise levels here"),
    "Skip Early CFG": _without("guidance acts at all steps here; --guidance-interval is near"),
    "Schedule max sigma": _without("the noisiest level is the model's here"),
    "Schedule min sigma": _without("the least noisy level is the model's here"),
    "Hypernet": _without("there are no hypernetworks here"),
    "Distilled CFG Scale": _without("belongs to models of another kind (Flux)"),
    "FP8 weight": _without("the weights are computed with as the file has them, or as --precision says"),
    "Noise Schedule": _without("give --zero-terminal-snr if the model needs it"),
    "VAE Decoder": _without("the model's VAE decodes; --vae names another"),
    "VAE Encoder": _without("the model's VAE encodes; --vae names another"),
    "Downcast alphas_cumprod": _without("the noise schedule is kept in full precision here"),
}  # fmt: skip
_BEGINNINGS: dict[str, Handler] = {
    "Hires ": _HIRES,
    "First pass size": _HIRES,
    "ControlNet": _without("its image and its model are not in the text; name them with --control and --control-model"),
    "ADetailer": _without("there is no second pass over faces here"),
    "FreeU": _without("there is no FreeU here"),
    "freeu": _without("there is no FreeU here"),
    "Dynamic thresholding": _without("guidance is not clipped here; --guidance-rescale is near"),
    "CFG Rescale": _without("give --guidance-rescale"),
    "Tiled Diffusion": _without("there is no tiled diffusion here"),
    "Regional Prompter": _without("there are no regions here"),
    "Soft inpainting": _MASK,
    "AddNet": _without("name the file with --lora"),
}
_NEARLY = {
    "DDIM": "1000 is no multiple of the steps, where the timesteps there are others, and more of them",
    "DDPM": "its noise levels are those of diffusers here",
    "PLMS": "its timesteps are those of diffusers here",
    "UniPC": "its order and noise levels are those of diffusers here",
    "LCM": "its noise levels are those of Forge, and near the end some of its input is kept, as in diffusers",
    "TCD": "its noise levels are those of diffusers here",
}
_EVEN_STEPS = {str(steps) for steps in range(1, 1001) if 1000 % steps == 0}
_SILENCE = {"Clip skip": "1", "RNG": "GPU"}
_TOGETHER = ("Sampler", "Schedule type", "Denoising strength")
_UNKNOWN = _without("latentdiff does not know this setting")


def _handler(name: str) -> Handler:
    if name in SETTINGS:
        return SETTINGS[name]
    return next((found for start, found in _BEGINNINGS.items() if name.startswith(start)), _UNKNOWN)


def _version(text: str) -> tuple[int, int] | None:
    """Major and minor number of the web UI: of "v1.9.4", "1.6.0-RC", and of Forge's "f2.0.1v1.10.1-previous-..."."""
    found = _VERSION.findall(text[:64])
    return (int(found[-1][0]), int(found[-1][1])) if found else None
