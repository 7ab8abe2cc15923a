"""What AUTOMATIC1111's web UI and its kin call samplers and schedules in the text of an image. Loads no heavy library.

One table serves the writer of our text and whoever reads theirs.
"""

from __future__ import annotations

from dataclasses import dataclass

from latentdiff.errors import DataError


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
AUTOMATIC = "Automatic"
SAMPLER_TITLES = {named.sampler: title for title, named in TITLES.items()}


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
    if schedule in (None, AUTOMATIC):
        return named
    if schedule not in SCHEDULES:
        raise DataError(f"the text names the schedule {schedule!r}; expected one of {', '.join(SCHEDULES)}")
    return Named(named.sampler, SCHEDULES[schedule], named.discard_penultimate)
