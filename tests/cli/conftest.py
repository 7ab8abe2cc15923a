"""The command line run in this process, from an empty folder, on a tiny model."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from latentdiff import Pipeline
from latentdiff.cli import run
from tests import peers


@dataclass(frozen=True)
class Done:
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def errors(self) -> list[str]:
        return [line for line in self.err.splitlines() if line.startswith("error:")]


@pytest.fixture
def workplace(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@cache
def load_once(source: object, options: frozenset) -> Pipeline:
    """Commands leave the models that they load as they are, so the tests can share them."""
    return load(source, **dict(options))


load = Pipeline.load


@pytest.fixture
def command(workplace, capfd, monkeypatch):
    """Run `latentdiff` with these arguments; an exception that it does not handle fails the test."""
    monkeypatch.setattr(Pipeline, "load", lambda source, **options: load_once(source, frozenset(options.items())))

    def call(*arguments: object) -> Done:
        capfd.readouterr()
        code = run([str(argument) for argument in arguments])
        return Done(code, *capfd.readouterr())

    return call


@pytest.fixture
def sd1(monkeypatch) -> Path:
    """A tiny model, loaded once for all commands of the tests."""
    return peers.folder("sd1")


def files(folder: Path) -> list[str]:
    """Everything below `folder`, hidden files too."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
