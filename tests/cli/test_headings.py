"""The headings under which help and the page list options."""

from __future__ import annotations

import click
import pytest

from latentdiff.cli import cli
from latentdiff.cli.headings import Command
from latentdiff.request.option import Option, flag_of
from latentdiff.request.options import OPTIONS
from latentdiff.serving.asked import NAMES
from latentdiff.training.finetuning.config import FinetuneConfig

WIDE = {**cli.context_settings, "max_content_width": 10_000, "terminal_width": 10_000}
LONGEST = 14  # options under one heading, which is a screen


def sections(command: click.Command) -> dict[str, list[str]]:
    """Heading -> the flags under it, in the order of the help."""
    found: dict[str, list[str]] = {}
    heading = ""
    for line in command.get_help(click.Context(command, **WIDE)).splitlines():
        if line.endswith(":") and not line.startswith(" "):
            heading = line[:-1]
        elif line.startswith("  -"):
            found.setdefault(heading, []).append(line.split()[0].rstrip(","))
    return found


@pytest.mark.parametrize("name", [name for name, one in cli.commands.items() if isinstance(one, Command)])
def test_help_lists_every_option_once(name):
    command = cli.commands[name]
    listed = [flag for flags in sections(command).values() for flag in flags]
    params = [one for one in command.get_params(click.Context(command)) if isinstance(one, click.Option)]
    assert sorted(listed) == sorted(one.opts[0] for one in params)


def test_options_of_generation_stand_under_their_headings():
    found = sections(cli.commands["generate"])
    for name, option in OPTIONS.items():
        if option.flags != ():
            assert option.flag(name) in found[option.heading or "Options"], name
    assert found["Options"][3:8] == ["--negative", "-n", "--seed", "--steps", "--guidance"]


@pytest.mark.parametrize("name", ["generate", "finetune"])
def test_no_heading_has_more_than_a_screen(name):
    assert all(len(flags) <= LONGEST for flags in sections(cli.commands[name]).values())


def test_every_key_of_a_fine_tuning_is_a_flag():
    flags = [flag for listed in sections(cli.commands["finetune"]).values() for flag in listed]
    assert {flag_of(name) for name in FinetuneConfig.model_fields} <= set(flags)


def test_the_page_has_a_heading_for_all_that_has_no_field_of_its_own():
    """See `SHOWN_APART` in `serving/page/form.js`."""
    assert {name for name in NAMES if not OPTIONS[name].heading} == {"steps", "guidance_scale", "sampler"}
    assert all(kind.__doc__ and kind.heading for kind in Option.__subclasses__())
