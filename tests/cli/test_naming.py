"""Errors of the library in the words of the command line."""

from __future__ import annotations

import ast
from pathlib import Path

import click
import pytest

import latentdiff
from latentdiff.cli import cli
from latentdiff.cli.naming import flags_of, with_flags
from latentdiff.request.options import OPTIONS

GENERATE, INPAINT = flags_of(cli.commands["generate"]), flags_of(cli.commands["inpaint"])


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("expected hires_strength to be a number", "expected --hires-strength to be a number"),
        ("expected guidance_scale to be 1", "expected --guidance to be 1"),
        ("expected hires, how much larger, with hires_strength; found 0.4 alone",
         "expected --hires, how much larger, with --hires-strength; found 0.4 alone"),
        ("eta belongs to the samplers ddim; found eta 0.5 with euler; leave it at 0",
         "--eta belongs to the samplers ddim; found --eta 0.5 with euler; leave it at 0"),
        ("expected a width that is a positive multiple of 8, found 7",
         "expected a --width that is a positive multiple of 8, found 7"),
        ("steps must be 1 to 1000, the number of training timesteps, found 2000",
         "--steps must be 1 to 1000, the number of training timesteps, found 2000"),
        ("rho belongs to spacings", "--rho belongs to spacings"),
        ("expected either sigmas or timesteps, found both", "expected either --sigmas or --timesteps, found both"),
        ("a prompt 'with steps and clip_skip' is a prompt", "a prompt 'with steps and clip_skip' is a prompt"),
        ("cannot write a/clip_skip.png; leave out --clip-skip", "cannot write a/clip_skip.png; leave out --clip-skip"),
    ],
)  # fmt: skip
def test_options_are_called_by_their_flags(message, shown):
    assert with_flags(message, GENERATE) == shown


def test_options_of_a_task():
    message = "expected no inversion with remove, only_masked or extend: they paint on another image"
    shown = "expected no --inversion with --remove, --only-masked or --extend: they paint on another image"
    assert with_flags(message, INPAINT) == shown


def test_every_option_in_a_refusal_is_called_by_its_flag():
    for command in cli.commands.values():
        flags = flags_of(command)
        for name in flags.keys() & OPTIONS.keys():
            assert with_flags(f"expected {name} to be 1, found 2", flags) == f"expected {flags[name]} to be 1, found 2"


def test_commands_are_told_so(command, sd1):
    done = command("generate", "cat", "--model", sd1, "--eta", 0.5, "--sampler", "euler", "--seed", 1)
    assert done.code == 2 and done.errors[0].startswith("error: --eta belongs to the samplers")
    done = command("generate", "cat", "--model", sd1, "--cache-centre", 99, "--cache-interval", 2, "--seed", 1)
    assert done.code == 2 and "cache_centre" not in done.err
    assert all(isinstance(one, click.Command) for one in cli.commands.values())


def test_the_library_never_names_flags_of_generation():
    """It is called from Python, too: there the flags would be a riddle."""
    flags = {flag for name, flag in GENERATE.items() if name in OPTIONS and "_" in name and flag[:2] == "--"}
    found = []
    for wing in ("diffusion", "request", "tasks", "prompts"):
        for path in (Path(latentdiff.__file__).parent / wing).rglob("*.py"):
            if path.name == "options.py" or path.parent.name == "foreign":  # where flags are said, or written as a command
                continue
            texts = [node.value for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.Constant)]
            found += [(path.name, text) for text in texts if isinstance(text, str) and any(f in text.split() for f in flags)]
    assert not found
