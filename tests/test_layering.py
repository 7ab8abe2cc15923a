"""Imports point one way. The floors of the house, lowest first; a module imports from its own room and from floors
below."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "latentdiff"

# A room is a file or a folder of the package; a folder within one may be a room of its own, on another floor.
FLOORS: list[list[set[str]]] = [
    [{"__init__"}, {"errors"}],
    [{"reading"}, {"request/domains"}, {"request/option"}, {"request/recorded"}],
    [{"request/options"}, {"request/infotext"}],
    [{"request/calls"}, {"request/foreign"}],
    [{"files"}, {"recipe"}, {"diffusion"}, {"prompts"}],
    [{"image"}, {"networks/device"}, {"networks/kernels"}],
    [{"networks/attention"}],
    [{"networks"}],
    [{"engines"}, {"checkpoints"}, {"training/data"}],
    [{"model/memory"}],
    [{"adapters"}, {"request"}],
    [{"adapters/control"}, {"networks/upscaling"}],
    [{"model/adapted"}, {"model/portable"}, {"training"}],
    [{"model"}],
    [{"pipeline"}],
    [{"evaluation"}, {"tasks"}, {"training/sheets"}],
    [{"training/finetuning"}, {"training/stages"}],
    [{"serving"}],
    [{"cli"}],
    [{"__main__"}],
]
ROOMS = {room for floor in FLOORS for rooms in floor for room in rooms}
ALONE = {"errors"}  # what this may import is nothing, and what the next may import is this
NEXT_TO_ALONE = {"diffusion", "files", "reading"}

FILES = sorted(path for path in PACKAGE.rglob("*.py"))


def room_of(path: Path) -> str:
    return room_named(path.relative_to(PACKAGE).with_suffix("").parts)


def room_named(parts: tuple[str, ...]) -> str:
    """The room of a module; the smallest that holds it."""
    names = ("/".join(parts[:length]) for length in range(len(parts), 0, -1))
    return next((name for name in names if name in ROOMS), parts[0])


@cache
def imports(path: Path) -> frozenset[str]:
    """Full names of what a file imports, at the top or inside functions."""
    return frozenset(_imports(path))


def _imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path.name} has a relative import; write the full name"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@cache
def own_imports(path: Path) -> set[str]:
    """Rooms of latentdiff that a file imports from."""
    parts = (tuple(name.split(".")[1:]) for name in imports(path) if name.startswith("latentdiff."))
    known = {room_of(file) for file in FILES}
    return {room if (room := room_named(name)) in known else "__init__" for name in parts}


def floor_of(room: str) -> int:
    return next(floor for floor, all_rooms in enumerate(FLOORS) for rooms in all_rooms if room in rooms)


def test_every_module_has_its_place():
    placed = [room for floor in FLOORS for rooms in floor for room in rooms]
    assert len(placed) == len(set(placed))
    assert {room_of(path) for path in FILES} <= set(placed)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path):
    if path == PACKAGE / "__init__.py":
        return  # hands out names of upper floors when they are first used
    room = room_of(path)
    for other in own_imports(path) - {room}:
        assert floor_of(other) < floor_of(room), f"{room} must not import {other}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_the_ground_stands_alone(path):
    room = room_of(path)
    if room in ALONE:
        assert not own_imports(path)
    if room in NEXT_TO_ALONE:
        assert own_imports(path) <= {room, "errors"}


@pytest.mark.parametrize("path", [p for p in FILES if room_of(p) == "diffusion"], ids=lambda path: path.name)
def test_mathematics_knows_no_modules(path):
    used = {f"{n.value.id}.{n.attr}" for n in ast.walk(ast.parse(path.read_text())) if is_attribute_of_name(n)}
    assert not [name for name in {*imports(path), *used} if name.startswith("torch.nn") or name.startswith("nn.")]


def is_attribute_of_name(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)


def test_peers_are_not_needed_at_run_time():
    for path in FILES:
        assert not {name.split(".")[0] for name in imports(path)} & {
            "diffusers",
            "peft",
            "scipy",
            "hypothesis",
            "pytest",
        }
