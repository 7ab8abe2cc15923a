"""An option stands in one place; everything else is made of it."""

from __future__ import annotations

import dataclasses
import inspect
from fractions import Fraction

import click
import numpy as np
import pytest

from latentdiff.cli import cli
from latentdiff.errors import UsageError
from latentdiff.pipeline import Pipeline
from latentdiff.recipe import Recipe
from latentdiff.request.calls import Settings
from latentdiff.request.option_texts import texts
from latentdiff.request.options import (
    KEPT,
    OPTIONS,
    GenerateOptions,
    SamplingOptions,
    SeededOptions,
    WalkOptions,
    checked,
    options_of,
)
from latentdiff.tasks import image_to_image, inpaint, interpolate, restore, translate

TAKERS = {
    Pipeline.__call__: GenerateOptions,
    image_to_image: SamplingOptions,
    inpaint: SamplingOptions,
    interpolate: SamplingOptions,
    restore: SeededOptions,
    translate: WalkOptions,
}
COMMANDS = {
    "generate": GenerateOptions,
    "edit": SamplingOptions,
    "inpaint": SamplingOptions,
    "restore": SeededOptions,
    "translate": WalkOptions,
}


@pytest.mark.parametrize("function", TAKERS, ids=lambda function: function.__name__)
def test_signatures_show_the_options_with_their_defaults(function):
    group = TAKERS[function]
    shown = inspect.signature(function).parameters
    assert all(shown[name].default == option.default for name, option in options_of(group).items())
    assert not any(parameter.kind is parameter.VAR_KEYWORD for parameter in shown.values())


def test_every_option_has_a_text():
    assert texts().keys() == OPTIONS.keys()
    assert all(text.endswith(".") for text in texts().values())


def test_defaults_lie_in_their_domains():
    for name, option in OPTIONS.items():
        for value in (option.default, option.fast):
            assert value is None or option.domain(name, value) == value


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_have_a_flag_for_every_option(command):
    flags = {parameter.name: parameter for parameter in cli.commands[command].params}
    for name, option in options_of(COMMANDS[command]).items():
        if option.flags == ():
            assert name not in flags
            continue
        assert flags[name].opts == list(option.flags or [f"--{name.replace('_', '-')}"])
        default = flags[name].get_default(click.Context(cli.commands[command]))
        assert default is None or default == option.default


def test_help_shows_defaults():
    wide = {**cli.context_settings, "max_content_width": 10_000}
    text = cli.commands["generate"].get_help(click.Context(cli.commands["generate"], **wide))
    for line in (
        "--steps N .*[default: 25]",
        "--guidance X .*[default: 5.0]",
        "--sampler .*[default: the model's, or ddim]",
        "--batch-size N .*[default: 4]",
    ):
        flag, default = line.split(" .*")
        (shown,) = [part for part in " ".join(text.split()).split(" --") if f"--{part}".startswith(flag)]
        assert default in shown


def test_recipes_have_a_field_for_every_kept_option():
    fields = {field.name: field for field in dataclasses.fields(Recipe)}
    for name, kept in KEPT.items():
        assert fields[name].type == kept.kind
        assert fields[name].default is (dataclasses.MISSING if kept.absent is ... else kept.absent)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("steps", np.int32(4), 4),
        ("seed", np.uint64(2**63), 2**63),
        ("seed", np.array([1, 2]), [1, 2]),
        ("seed", (5, np.int8(6)), [5, 6]),
        ("seed", range(2), [0, 1]),
        ("guidance_scale", np.float32(5), 5.0),
        ("guidance_scale", 7, 7.0),
        ("eta", Fraction(1, 2), 0.5),
        ("guidance_interval", [0, np.float64(2)], (0.0, 2.0)),
        ("fast", np.True_, True),
        ("negative_prompt", ("a", "b"), ["a", "b"]),
    ],
)
def test_numbers_of_any_library_become_pythons(name, value, expected):
    found = checked({name: value})[name]
    assert found == expected and type(found) is type(expected)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("steps", "5", "expected steps to be a whole number of 1 or more, found '5'"),
        ("steps", 0, "expected steps to be a whole number of 1 or more, found 0"),
        ("steps", 2.0, "expected steps to be a whole number of 1 or more, found 2.0"),
        ("steps", True, "whole number of 1 or more, found True"),
        ("height", 64.0, "expected height to be a whole number of 1 or more, found 64.0"),
        ("seed", [1.7], "expected each seed to be a whole number of 0 to 2..64 - 1, found 1.7"),
        ("seed", 1.5, "expected seed to be a whole number of 0 to 2..64 - 1, found 1.5"),
        ("seed", "7", "found '7'"),
        ("seed", True, "found True"),
        ("seed", [False], "found False"),
        ("seed", -1, "found -1"),
        ("seed", 2**64, "found 18446744073709551616"),
        ("num_images", 10**7, "expected num_images to be a whole number of 1 to 10000, found 10000000"),
        ("guidance_scale", "strong", "expected guidance_scale to be a finite number, found 'strong'"),
        ("guidance_scale", float("nan"), "finite number, found nan"),
        ("guidance_scale", float("inf"), "finite number, found inf"),
        ("guidance_rescale", 1.1, "expected guidance_rescale to be a finite number of 0 to 1, found 1.1"),
        ("eta", -0.1, "0 to 1, found -0.1"),
        ("guidance_interval", (2.0, 1.0), "two finite numbers, 0 <= low < high, found .2.0, 1.0."),
        ("guidance_interval", (0.0, float("inf")), "two finite numbers"),
        ("guidance_interval", 3, "two finite numbers"),
        ("guidance_interval", (1, 2, 3), "two finite numbers"),
        ("sampler", "heun2", "expected sampler to be one of ddim, .*, found 'heun2'"),
        ("sampler", 3, "expected sampler to be one of ddim"),
        ("spacing", "even", "expected spacing to be one of leading, .*, found 'even'"),
        ("negative_prompt", 3, "expected negative_prompt to be a text or a list of texts, found 3"),
        ("negative_prompt", ["a", None], "a text or a list of texts"),
        ("batch_size", 0, "1 or more, found 0"),
        ("cache_interval", 0, "1 or more, found 0"),
        ("cache_branch", -1, "0 or more, found -1"),
        ("fast", "no", "expected fast to be True or False, found 'no'"),
        ("progress", 1, "expected progress to be True or False, found 1"),
        ("callback", "print", "expected callback to be a function, found 'print'"),
    ],
)
def test_values_outside_their_domain(name, value, message):
    with pytest.raises(UsageError, match=message) as caught:
        checked({name: value})
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_none_is_not_given():
    assert Settings(**dict.fromkeys(options_of(SamplingOptions))) == Settings()
    assert (Settings().negative_prompt, Settings().steps, Settings().progress) == ("", 25, True)
