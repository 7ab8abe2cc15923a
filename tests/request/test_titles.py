"""The web UIs' names of samplers and schedules."""

from __future__ import annotations

from typing import get_args

import pytest

from latentdiff.diffusion.config import ScheduleConfig
from latentdiff.diffusion.samplers import SAMPLERS, SPACINGS
from latentdiff.diffusion.schedule import Schedule
from latentdiff.errors import DataError
from latentdiff.request.infotext import (
    SAMPLER_TITLES,
    SCHEDULES,
    TITLES,
    WITHOUT_SCHEDULE,
    Named,
    read_sampler,
    written_method,
)
from latentdiff.request.options import SamplerName, SpacingName


def test_every_sampler_has_one_title_and_every_title_names_what_is_here() -> None:
    assert set(SAMPLER_TITLES) == set(get_args(SamplerName)) and len(SAMPLER_TITLES) == len(TITLES)
    assert {named.spacing for named in TITLES.values()} | set(SCHEDULES.values()) <= set(get_args(SpacingName))


@pytest.mark.parametrize(
    ("title", "schedule", "expected"),
    [
        ("Euler a", None, Named("euler-a", "normal")),
        ("Euler a", "Automatic", Named("euler-a", "normal")),
        ("Euler a", "SGM Uniform", Named("euler-a", "sgm-uniform")),
        ("DPM++ 2M", None, Named("dpmpp-2m", "karras")),
        ("DPM++ 2M Karras", None, Named("dpmpp-2m", "karras")),
        ("DPM++ 2M SDE", "Automatic", Named("dpmpp-2m-sde", "exponential")),
        ("DPM++ 2M SDE Karras", None, Named("dpmpp-2m-sde", "karras")),
        ("DPM++ 3M SDE", "Karras", Named("dpmpp-3m-sde", "karras", discard_penultimate=True)),
        ("DPM2 a Karras", None, Named("dpm2-a", "karras", discard_penultimate=True)),
        ("LMS Karras", None, Named("lms", "karras")),
        ("DDIM", None, Named("ddim", "leading")),
        ("PLMS", None, Named("pndm", "leading")),
        ("Euler", "DDIM", Named("euler", "ddim-uniform")),
        ("Euler", "Align Your Steps", Named("euler", "ays-a1111")),
    ],
)
def test_titles_are_read(title: str, schedule: str | None, expected: Named) -> None:
    assert read_sampler(title, schedule) == expected


@pytest.mark.parametrize(
    ("title", "schedule", "says"),
    [("DPM adaptive", None, "sampler 'DPM adaptive'"), ("Euler", "Turbo", "schedule 'Turbo'")],
)
def test_what_is_not_here_is_named(title: str, schedule: str | None, says: str) -> None:
    with pytest.raises(DataError, match=says):
        read_sampler(title, schedule)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_the_text_says_how_strong_the_start_noise_is(name: str, spacing: str) -> None:
    schedule = Schedule(ScheduleConfig())
    scale = SAMPLERS[name].start_scale(schedule, spacing)
    options = {"sampler": name, "spacing": spacing, "discard_penultimate": False, "eta": None}
    words = written_method({**options, "noise_source": "cpu", "noise_start": None})
    if SAMPLER_TITLES[name] not in WITHOUT_SCHEDULE:
        assert ("SGM noise multiplier" in words) == (scale == 1.0)
