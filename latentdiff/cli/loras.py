"""LoRAs on the command line: FILE:SCALE, loading them, and finding those that a recipe names."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from latentdiff.errors import DataError
from latentdiff.recipe import Recipe

if TYPE_CHECKING:
    from latentdiff.pipeline import Pipeline

ScaledFile = tuple[str, float]
_SUFFIXES = (".safetensors", ".bin", ".pt", ".ckpt")


def parse_scaled(text: str) -> ScaledFile:
    """ "file.safetensors:0.8" -> ("file.safetensors", 0.8); without a number the scale is 1."""
    path, colon, scale = text.rpartition(":")
    try:
        return (path, float(scale)) if colon and path and not Path(text).exists() else (text, 1.0)
    except ValueError:
        return text, 1.0


def _parse_all(context: click.Context, parameter: click.Parameter, texts: tuple[str, ...]) -> list[ScaledFile]:
    return [parse_scaled(text) for text in texts]


LORAS = click.option(
    "--lora",
    "loras",
    multiple=True,
    callback=_parse_all,
    metavar="FILE[:SCALE]",
    help="Adapt the model by a LoRA file, at this strength.  [default: 1]  Repeat it for several at once.",
)


@contextmanager
def with_loras(pipe: Pipeline, loras: Iterable[ScaledFile]) -> Iterator[None]:
    """Inside, the model is adapted by these; how much of each file fits it goes to stderr."""
    names = []
    try:
        for number, (path, scale) in enumerate(loras, 1):
            name = f"{number}: {path}"  # the same file may come twice
            report = pipe.load_lora(path, scale, name)
            names.append(name)
            click.echo(f"{path}: {report}", err=True)
        yield
    finally:
        for name in names:
            pipe.unload_lora(name)


def loras_of(recipe: Recipe, folders: Iterable[Path]) -> list[ScaledFile]:
    """The files of a recipe's LoRAs, found by their names or contents in these folders.

    Raises:
        DataError: one is not there, or the recipe does not say which it is.
    """
    folders = list(folders)
    try:
        return [(str(_find(entry["file"], entry["sha256"], folders)), float(entry["scale"])) for entry in recipe.loras]
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"the picture's recipe does not say which LoRAs it was made with: {error}") from error


def _find(file: str, sha256: str, folders: list[Path]) -> Path:
    from latentdiff.checkpoints.hashing import file_hash

    name = Path(file).name  # never a path: the recipe may come from anywhere
    named = [folder / name for folder in folders]
    others = [
        path for folder in folders if folder.is_dir() for path in sorted(folder.iterdir()) if path.suffix in _SUFFIXES
    ]
    for path in [*named, *others]:
        if path.is_file() and file_hash(path) == sha256:
            return path
    places = ", ".join(map(str, folders))
    raise DataError(
        f"the picture was made with the LoRA {name} (SHA-256 {sha256[:10]}...), which is not in {places}; "
        "say which folder it is in with --lora-dir"
    )
