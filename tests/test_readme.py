"""Everything that the README tells a reader to type exists and is understood."""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import click
import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LAUNCHERS = {"accelerate", "sbatch", "srun"}  # of several processes or machines
FENCE = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(language: str, pages: Sequence[Path] = PAGES) -> list[str]:
    return [body for page in pages for found, body in FENCE.findall(page.read_text()) if found == language]


def shell_lines() -> list[list[str]]:
    """The words of every shell line; lines that go on after a backslash are one."""
    lines = [
        shlex.split(line, comments=True) for body in blocks("bash") for line in body.replace("\\\n", " ").splitlines()
    ]
    return [words for words in lines if words]


def commands(program: str) -> list[list[str]]:
    """The arguments of every shell line that calls `program`, wherever it is said to lie."""
    return [words[1:] for words in shell_lines() if Path(words[0]).name == program]


def test_shell_lines_are_of_known_programs() -> None:
    """Otherwise a line would be shown that no test below looks at."""
    known = {"latentdiff", "make", "python", "python3", "pip", "ruff"} | LAUNCHERS
    assert {Path(words[0]).name for words in shell_lines() if "=" not in words[0]} <= known
    assert len(commands("latentdiff")) >= 8


@pytest.mark.parametrize("arguments", commands("latentdiff"), ids=" ".join)
def test_command_lines_parse(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every option exists and every value is allowed; files need not exist, and nothing is run."""
    from latentdiff.cli import cli

    monkeypatch.setattr(click.File, "convert", lambda self, value, param, ctx: value)
    monkeypatch.setattr(click.Path, "convert", lambda self, value, param, ctx: self.type(value) if self.type else value)
    monkeypatch.setattr(os.path, "exists", lambda path: True)
    monkeypatch.setattr(Path, "exists", lambda self, **how: True)
    monkeypatch.setattr(Path, "is_dir", lambda self: not self.suffix)
    name, *rest = arguments
    command = cli.get_command(click.Context(cli), name)
    assert command is not None, f"latentdiff has no command {name}"
    command.make_context(name, rest, parent=click.Context(cli, info_name="latentdiff", **cli.context_settings))


@pytest.mark.parametrize("arguments", commands("make"), ids=" ".join)
def test_make_targets_exist(arguments: list[str]) -> None:
    subprocess.run(["make", "-n", *arguments], cwd=ROOT, check=True, capture_output=True)


@pytest.mark.parametrize("arguments", [a for a in commands("python") if a[0].endswith(".py")], ids=" ".join)
def test_tools_know_their_options(arguments: list[str]) -> None:
    tool, *rest = arguments
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, tool, "--help"]
    shown = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout
    for option in (word.split("=")[0] for word in rest if word.startswith("-")):
        assert re.search(rf"(?<![\w-]){re.escape(option)}(?![\w-])", shown), f"{tool} has no option {option}"


@pytest.mark.parametrize("body", blocks("python"))
def test_python_parses(body: str) -> None:
    ast.parse(body)


@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / "weights" / "model_index.json").exists(), reason="no embedded model")
@pytest.mark.parametrize("body", blocks("python", PAGES[:1]))  # others need a checkpoint or a server
def test_python_runs(body: str, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", body], cwd=tmp_path, env=environment, check=True)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\((?!https?://)([^)#\s]+)", page.read_text())
    missing = [target for target in targets if not (page.parent / target).exists()]
    assert not missing


def test_files_named_in_the_architecture_exist() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    named = set(re.findall(r"`((?:\w+/)*\w+\.py|\w+/)`", text)) - {"tasks/"}
    assert {name for name in named if not any(ROOT.glob(name)) and not any((ROOT / "latentdiff").rglob(name))} == set()
