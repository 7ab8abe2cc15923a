"""Imports point one way. The floors of the house, lowest first; a module imports from its own room and from floors below."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "latentdiff"

MATHEMATICS = {"schedule", "parameterization", "guidance", "denoise", "latents", "samplers"}
FLOORS: list[list[set[str]]] = [
    [{"__init__"}, {"errors"}, {"names"}, {"tokenizer"}],
    [{"config"}, {"files"}, {"attention"}, {"embedded"}, {"layout"}, {"recipe"}, {"mapping"}],
    [MATHEMATICS, {"layers"}, {"device"}, {"image"}, {"prompt"}, {"taps"}],
    [{"unet"}, {"vae"}, {"text_encoder"}, {"progress"}, {"data"}],
    [{"engines"}, {"checkpoints"}],
    [{"conditioning"}, {"coding"}, {"deepcache"}, {"previews"}, {"memory"}],
    [{"lora"}, {"request"}],
    [{"calibration"}],
    [{"model"}, {"training"}],
    [{"pipeline"}],
    [{"evaluation"}, {"tasks"}, {"finetuning"}],
    [{"cli"}],
    [{"__main__"}],
]
ALONE = {"errors", "names"}  # what these may import is nothing, and what the next may import are these
NEXT_TO_ALONE = {"config", "files", "attention"}

FILES = sorted(path for path in PACKAGE.rglob("*.py"))


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> Iterator[str]:
    """Full names of what a file imports, at the top or inside functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path.name} has a relative import; write the full name"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own_imports(path: Path) -> set[str]:
    """Rooms of latentdiff that a file imports from."""
    rooms = {name.split(".")[1] for name in imports(path) if name.startswith("latentdiff.")}
    known = {room_of(file) for file in FILES}
    return {room if room in known else "__init__" for room in rooms}


def place(room: str) -> tuple[int, set[str]]:
    return next((floor, rooms) for floor, all_rooms in enumerate(FLOORS) for rooms in all_rooms if room in rooms)


def test_every_module_has_its_place():
    placed = [room for floor in FLOORS for rooms in floor for room in rooms]
    assert len(placed) == len(set(placed))
    assert {room_of(path) for path in FILES} <= set(placed)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path):
    if path == PACKAGE / "__init__.py":
        return  # hands out names of upper floors when they are first used
    floor, rooms = place(room_of(path))
    for other in own_imports(path):
        other_floor, _ = place(other)
        assert other_floor < floor or other in rooms, f"{room_of(path)} must not import {other}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_the_ground_stands_alone(path):
    room = room_of(path)
    if room in ALONE:
        assert not own_imports(path)
    if room in NEXT_TO_ALONE:
        assert own_imports(path) <= {room, "errors"}
    if room in MATHEMATICS:
        assert own_imports(path) <= MATHEMATICS | {"errors", "config"}


@pytest.mark.parametrize("path", [p for p in FILES if room_of(p) in MATHEMATICS], ids=lambda path: path.name)
def test_mathematics_knows_no_modules(path):
    used = {f"{n.value.id}.{n.attr}" for n in ast.walk(ast.parse(path.read_text())) if is_attribute_of_name(n)}
    assert not [name for name in {*imports(path), *used} if name.startswith("torch.nn") or name.startswith("nn.")]


def is_attribute_of_name(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)


def test_peers_are_not_needed_at_run_time():
    for path in FILES:
        assert not {name.split(".")[0] for name in imports(path)} & {"diffusers", "peft", "scipy", "hypothesis", "pytest"}
