"""The grammar of the text that AUTOMATIC1111's web UI and its kin put into images: prompt, negative prompt, settings.

    a castle
    Negative prompt: fog
    Steps: 20, Sampler: Euler a, CFG scale: 7, Seed: 1, Size: 512x512, Model: "a, b"

The last line is one of settings if it has at least three; extensions may leave lines of their own behind it. A value
with a comma, a colon or a line break is a JSON string. Everything takes time in proportion to the text's length.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import NoneType
from typing import Any, cast, get_args, get_origin

from latentdiff.errors import DataError
from latentdiff.reading.json import is_unicode, parse_json

NEGATIVE = "Negative prompt:"
FEWEST_SETTINGS = 3
_KEY = re.compile(r"\w[\w \-/]+$")  # at the end of what stands before a colon
_LONGEST_KEY = 64
_QUOTED = re.compile(r'"(?:\\.|[^\\"])*"')
_BEHIND = re.compile(r"\s*(\w[\w \-/]{1,63}):\s*(.*)")


@dataclass(frozen=True)
class InfoText:
    """A text by its parts; `settings` and what stands `behind` them in the order of the text."""

    prompt: str
    negative: str
    settings: dict[str, str]
    behind: dict[str, str]


def split(text: str) -> InfoText:
    """Take a text apart; one without a line of settings has no settings.

    As its authors' programs do, a line of the prompt that begins with "Negative prompt:" begins the negative prompt.

    Raises:
        DataError: the text holds lone surrogates.
    """
    if not is_unicode(text):
        raise DataError("the image's parameters text holds half of a character, a lone surrogate")
    lines = text.strip().split("\n")
    last = len(lines) - 1
    settings = read_settings(lines[last])
    if "Steps" not in settings:  # an extension's line, or words of a prompt
        places = [i for i, line in enumerate(lines) if line.startswith("Steps: ")]
        last = places[-1] if places else last
        settings = read_settings(lines[last])
    if len(settings) < FEWEST_SETTINGS:
        last, settings = len(lines), {}
    told, behind = lines[:last], dict[str, str]()
    for line in lines[last + 1 :]:
        key = _BEHIND.match(line)
        if key:
            behind[key[1]] = key[2]
        elif behind:
            behind[next(reversed(behind))] += f"\n{line}"
        else:
            behind[""] = line
    start = next((i for i, line in enumerate(told) if line.startswith(NEGATIVE)), len(told))
    negative = "\n".join(told[start:]).removeprefix(NEGATIVE).strip()
    return InfoText("\n".join(told[:start]).strip(), negative, settings, behind)


def joined(prompt: str, negative: str, settings: Mapping[str, str]) -> str:
    """The text of these parts."""
    lines = [prompt, *([f"{NEGATIVE} {negative}"] if negative else [])]
    return "\n".join([*lines, ", ".join(f"{key}: {_quote(value)}" for key, value in settings.items())])


def read_settings(line: str) -> dict[str, str]:
    """ "Key: value, Key: value"; text that is neither a key nor a value is passed over."""
    found: dict[str, str] = {}
    place = 0
    while (colon := line.find(":", place)) >= 0:
        before = line[max(place, colon - _LONGEST_KEY) : colon]
        key = _KEY.search(before[before.rfind(",") + 1 :])
        if not key:
            place = colon + 1
            continue
        start = colon + 1
        start += len(line[start : start + _LONGEST_KEY]) - len(line[start : start + _LONGEST_KEY].lstrip())
        quoted = _QUOTED.match(line, start) if line.startswith('"', start) else None
        if quoted and line[quoted.end() : quoted.end() + 1] in ("", ","):
            end = quoted.end()
        else:
            end = next((comma for comma in (line.find(",", start),) if comma >= 0), len(line))
        found[key[0]] = _unquote(line[start:end])
        place = end
    return found


def _quote(value: str) -> str:
    is_plain = value == value.strip() and not re.search(r'[,:\n"]', value)
    return value if is_plain else json.dumps(value, ensure_ascii=False)


def _unquote(value: str) -> str:
    try:
        return str(parse_json(value, "a setting", DataError)) if value.startswith('"') else value.strip()
    except DataError:
        return value


def written_value(value: Any) -> str:
    """A value as the text of the web UIs has it."""
    return " to ".join(map(str, cast(tuple[float, ...], value))) if isinstance(value, tuple) else str(value)


def read_value(kind: Any, text: str) -> Any:
    """What `written_value` wrote of a value of this type, which may be None.

    Raises:
        ValueError: it is not a value of this type.
    """
    kind = next(kind for kind in (get_args(kind) or (kind,)) if kind is not NoneType)
    if get_origin(kind) is tuple:
        return tuple(part(end) for part, end in zip(get_args(kind), text.split(" to "), strict=True))
    return kind(text)


@dataclass(frozen=True)
class Named:
    """A sampler as its title means it, with the options of those names."""

    sampler: str
    spacing: str  # what "Automatic" is for this sampler
    discard_penultimate: bool = False


TITLES: dict[str, Named] = {
    "DDIM": Named("ddim", "leading"),
    "DDPM": Named("ddpm", "leading"),
    "Euler": Named("euler", "normal"),
    "Euler a": Named("euler-a", "normal"),
    "Heun": Named("heun", "normal"),
    "LMS": Named("lms", "normal"),
    "DPM2": Named("dpm2", "karras", discard_penultimate=True),
    "DPM2 a": Named("dpm2-a", "karras", discard_penultimate=True),
    "DPM++ 2M": Named("dpmpp-2m", "karras"),
    "DPM++ 2S": Named("dpmpp-2s", "karras"),
    "DPM++ 2S a": Named("dpmpp-2s-a", "karras"),
    "DPM++ SDE": Named("dpmpp-sde", "karras"),
    "DPM++ 2M SDE": Named("dpmpp-2m-sde", "exponential"),
    "DPM++ 3M SDE": Named("dpmpp-3m-sde", "exponential", discard_penultimate=True),
    "UniPC": Named("unipc", "leading"),
    "PLMS": Named("pndm", "leading"),
    "LCM": Named("lcm", "normal"),
    "TCD": Named("tcd", "lcm"),
    "Restart": Named("restart", "karras"),
}
SCHEDULES = {
    "Uniform": "normal",
    "Normal": "normal",
    "Karras": "karras",
    "Exponential": "exponential",
    "Polyexponential": "polyexponential",
    "SGM Uniform": "sgm-uniform",
    "Simple": "simple",
    "DDIM": "ddim-uniform",
    "Beta": "beta",
    "KL Optimal": "kl-optimal",
    "Align Your Steps": "ays-a1111",
}
UPSCALERS = {
    "Latent": "latent",
    "Latent (antialiased)": "latent-antialiased",
    "Latent (bicubic)": "latent-bicubic",
    "Latent (bicubic antialiased)": "latent-bicubic-antialiased",
    "Latent (nearest)": "latent-nearest",
    "Latent (nearest-exact)": "latent-nearest-exact",
    "Lanczos": "lanczos",
}
AUTOMATIC = "Automatic"
SAMPLER_TITLES = {named.sampler: title for title, named in TITLES.items()}
SCHEDULE_TITLES = {spacing: title for title, spacing in reversed(SCHEDULES.items())}
# Titles whose noise levels are their own: there a schedule changes nothing.
WITHOUT_SCHEDULE = ("DDIM", "DDPM", "UniPC", "PLMS")
# Which of ours start from all noise where nothing else is asked for; the others start from a share sigma of noise, which
# the web UIs do unless "SGM noise multiplier" says otherwise.
START_FROM_UNIT = ("dpmpp-2m", "dpmpp-2s", "dpmpp-2m-sde", "dpmpp-3m-sde", "lcm", "tcd")


def written_method(method: Mapping[str, Any]) -> dict[str, str]:
    """The options of a recipe that say how steps are taken, in the words of the web UIs.

    What they have no word for stands under a key of ours: "Spacing", "Noise source".
    """
    named = TITLES[SAMPLER_TITLES[method["sampler"]]]
    spacing, source, start = method["spacing"], method["noise_source"], method["noise_start"]
    words = {"Sampler": SAMPLER_TITLES[named.sampler]}
    if spacing == "uniform-lambda":  # which has been our name for it
        words |= {"Schedule type": "Exponential", "Spacing": spacing}
    elif spacing in SCHEDULE_TITLES:
        words["Schedule type"] = SCHEDULE_TITLES[spacing]
    elif spacing:
        words["Spacing"] = spacing
    if method["discard_penultimate"]:
        words["Discard penultimate sigma"] = "True"
    if method["eta"] is not None:
        words["Eta DDIM" if named.sampler == "ddim" else "Eta"] = str(method["eta"])
    words["RNG"] = "NV" if source == "nv" else "CPU"
    if source == "comfy":
        words["Noise source"] = source
    starts_from_unit = named.sampler in START_FROM_UNIT or spacing == "leading"
    if words["Sampler"] not in WITHOUT_SCHEDULE and (start == "unit" or (start is None and starts_from_unit)):
        words["SGM noise multiplier"] = "True"
    return words


def read_method(words: Mapping[str, str]) -> dict[str, Any]:
    """What `written_method` wrote; texts of before have "Spacing" in place of "Schedule type", and no "RNG".

    Raises:
        KeyError, ValueError: a word that is none of them.
    """
    method: dict[str, Any] = {"sampler": TITLES[words["Sampler"]].sampler}
    if "Spacing" in words or "Schedule type" in words:
        method["spacing"] = words["Spacing"] if "Spacing" in words else SCHEDULES[words["Schedule type"]]
    if "Discard penultimate sigma" in words:
        method["discard_penultimate"] = words["Discard penultimate sigma"] == "True"
    if "Eta" in words or "Eta DDIM" in words:
        method["eta"] = float(words.get("Eta", words.get("Eta DDIM", "")))
    if "RNG" in words:
        method["noise_source"] = words.get("Noise source") or {"CPU": "cpu", "NV": "nv"}[words["RNG"]]
    return method


def read_sampler(title: str, schedule: str | None = None) -> Named:
    """What a text means that says `Sampler: title` and perhaps `Schedule type: schedule`.

    Before that key existed the schedule was a suffix of the title, as in "DPM++ 2M Karras", and no suffix meant
    uniform; a text without the key and without a suffix is read as today's programs do: Automatic.

    Raises:
        DataError: a sampler or a schedule that is not here.
    """
    for suffix, spacing in SCHEDULES.items():
        base = title.removesuffix(f" {suffix}")
        if base != title and base in TITLES and schedule in (None, AUTOMATIC, suffix):
            return Named(TITLES[base].sampler, spacing, TITLES[base].discard_penultimate)
    if title not in TITLES:
        raise DataError(f"the text names the sampler {title!r}; expected one of {', '.join(TITLES)}")
    named = TITLES[title]
    if schedule in (None, AUTOMATIC) or title in WITHOUT_SCHEDULE:
        return named
    if schedule not in SCHEDULES:
        raise DataError(f"the text names the schedule {schedule!r}; expected one of {', '.join(SCHEDULES)}")
    return Named(named.sampler, SCHEDULES[schedule], named.discard_penultimate)


def written_pass(options: Mapping[str, Any]) -> dict[str, str]:
    """How a second pass enlarges and how far it goes, and that edges continue, in the words of the web UIs."""
    tiling = {"Tiling": "True", "Seamless": options["seamless"]} if options["seamless"] else {}
    if options["hires"] is None:
        return tiling
    upscaler = options["hires_upscaler"]  # of a file, its name
    title = next((title for title, name in UPSCALERS.items() if name == upscaler), upscaler.rpartition(".")[0] or upscaler)
    return tiling | {"Hires upscaler": title, "Denoising strength": str(options["hires_strength"])}


def read_pass(words: Mapping[str, str]) -> dict[str, Any]:
    """What `written_pass` wrote.

    Raises:
        KeyError, ValueError: a word that is none of them.
    """
    seamless = {"seamless": words["Seamless"]} if "Seamless" in words else {}
    if "Hires upscale" not in words:
        return seamless
    return seamless | {
        "hires_upscaler": UPSCALERS[words["Hires upscaler"]],
        "hires_strength": float(words["Denoising strength"]),
    }
