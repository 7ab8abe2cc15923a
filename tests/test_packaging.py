"""What is shipped is complete, consistent, and free of traces of the machine it was written on."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

import latentdiff

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]


def tracked_files() -> list[Path]:
    """Files under version control."""
    git = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if git.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in git.stdout.split("\0") if name and (ROOT / name).is_file()]


def imported_packages(folder: Path) -> set[str]:
    """Top-level packages that the code in `folder` imports anywhere, lazily or not."""
    names: set[str] = set()
    for file in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                names.add(node.module.split(".")[0])
    return names - set(sys.stdlib_module_names)


def distribution_names(requirements: list[str]) -> set[str]:
    return {canonical(Requirement(line).name) for line in requirements}


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_version_stands_in_one_place() -> None:
    assert PROJECT["dynamic"] == ["version"] and "version" not in PROJECT
    assert re.fullmatch(r"\d+\.\d+\.\d+", latentdiff.__version__)


def test_every_import_is_a_declared_dependency() -> None:
    known = {"open_clip": "open_clip_torch"}  # what is imported under another name, and may be absent
    installed = packages_distributions()
    optional = [line for name, lines in EXTRAS.items() if name != "test" for line in lines]
    declared = distribution_names(PROJECT["dependencies"] + optional)
    imported = imported_packages(ROOT / "latentdiff") - {"latentdiff"}
    owners = {name: {canonical(known.get(name) or installed.get(name, [name])[0])} for name in imported}
    assert {name for name, owner in owners.items() if not owner & declared} == set()


def test_constraints_pin_a_version_of_every_dependency() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    versions = {canonical(pin.name): str(pin.specifier).removeprefix("==") for pin in pins}
    for line in PROJECT["dependencies"] + EXTRAS["test"]:
        wanted = Requirement(line)
        pinned = versions.get(canonical(wanted.name))
        assert pinned and wanted.specifier.contains(pinned), f"{line} is pinned to {pinned}"


def test_license() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text and "Version 2.0, January 2004" in text
    assert PROJECT["license"] == "Apache-2.0"


def test_no_traces_of_a_machine() -> None:
    traces = re.compile(r"(?<![\w.:/-])/(?:work|root|home|Users)/[\w.]+")
    found = []
    for file in tracked_files():
        try:
            text = file.read_text("utf-8")
        except UnicodeDecodeError:
            continue
        found += [f"{file.relative_to(ROOT)}: {match.group()}" for match in traces.finditer(text)]
    assert found == []


def test_configs_parse() -> None:
    configs = sorted((ROOT / "configs").rglob("*.yaml"))
    assert configs
    for config in configs:
        assert isinstance(yaml.safe_load(config.read_text()), dict), config


def test_no_tracked_file_is_ignored() -> None:
    """A rule in .gitignore that matches a tracked file would also leave it out of the wheel."""
    tracked_files()
    command = ["git", "ls-files", "--cached", "--ignored", "--exclude-standard"]
    assert subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout == ""


@pytest.fixture(scope="module")
def wheel_names(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """The names of the files in a freshly built wheel."""
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = out.glob("*.whl")
    return set(zipfile.ZipFile(wheel).namelist())


def test_wheel_holds_the_package_and_the_embedded_model(wheel_names: set[str]) -> None:
    expected = set()
    for file in tracked_files():
        path = file.relative_to(ROOT)
        if path.parts[0] == "latentdiff":
            expected.add(path.as_posix())
        elif path.parts[0] == "weights":
            expected.add(f"latentdiff/{path.as_posix()}")
    assert expected - wheel_names == set()


def test_wheel_holds_nothing_else(wheel_names: set[str]) -> None:
    tops = {name.split("/")[0] for name in wheel_names}
    assert tops == {"latentdiff", f"latentdiff-{latentdiff.__version__}.dist-info"}
    assert not any(name.endswith((".pyc", ".ckpt", ".pt")) for name in wheel_names)
